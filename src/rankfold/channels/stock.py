"""Entries of a transformers configuration that hold the sizes of a model that lost channels, found by trying."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from rankfold.channels.groups import ChannelGroup
from rankfold.channels.narrowing import cuts_of
from rankfold.errors import PlanError
from rankfold.layers.attention import SplitAttention
from rankfold.layers.splitting import split_

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Kept: TypeAlias = Mapping[str, tuple[int, int]]  # group → units and how many of them stay
Entries: TypeAlias = Mapping[str, tuple[int, ...]]  # entry of a configuration → its value in every layer
HEAD_SIZE = re.compile(r"head_dim|head_size|kv_channels|d_kv")  # heads go whole: their size never changes


def is_stock(model: nn.Module) -> bool:
    """Whether a model is one of transformers, built from a configuration."""
    return callable(getattr(model, "save_pretrained", None)) and hasattr(getattr(model, "config", None), "to_dict")


def stock_units(model: Any, groups: Sequence[ChannelGroup]) -> Collection[int]:
    """Numbers of units that groups may go down to together so that a configuration of the model's class can hold them.

    Args:
        model: A model of transformers, whole.
        groups: Groups at the same place of like layers, of equally many units.

    Returns:
        Numbers below the whole; empty where no configuration can hold fewer.
    """
    units = groups[0].units
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    masks = {group.name: torch.arange(units) < units - 1 for group in groups}
    for name, axes in cuts_of(model, groups, masks).items():
        shapes[name] = tuple(len(axes.get(axis, range(size))) for axis, size in enumerate(shapes[name]))
    found = entries_of(model, shapes, {group.name: (units, units - 1) for group in groups})
    if isinstance(found, dict):
        return [count for count in range(1, units) if _is_valid(model.config, found, units, count)]
    return []


def _is_valid(config: Any, entries: Entries, units: int, count: int) -> bool:
    """Whether a configuration with fewer units passes its class's own checks."""
    whole = config.to_dict()
    try:
        scaled = {name: ((whole[name] or units) // units * count,) for name in entries}
        type(config).from_dict(configured(config, scaled).to_dict())
    except Exception:  # noqa: BLE001 - whatever the class raises
        return False
    return True


def entries_of(model: Any, wanted: Shapes, kept: Kept) -> dict[str, tuple[int, ...]] | tuple[str, Any]:
    """The entries that change, and their values, so that a model built from them has tensors of the wanted shapes.

    An entry is taken where more tensors have the wanted shapes with it, the one that mends most first.

    Args:
        model: A model of transformers; its configuration is the one before channels were removed.
        wanted: Shape of every tensor.
        kept: Numbers of units before and after, for every group that lost units.

    Returns:
        The entries; or, where there are none, a tensor that then has another shape, and that shape.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    off = _off(model, wanted, chosen) or {}
    choices = list(_choices(model.config, kept))
    while off:
        best = None
        for entry, values in choices:
            if entry in chosen:
                continue
            left = _off(model, wanted, {**chosen, entry: values})
            if left is not None and len(left) < len(off) and (best is None or len(left) < len(best[1])):
                best = (entry, left, values)
        if best is None:
            return min(off.items())
        chosen[best[0]], off = best[2], best[1]
    return chosen


def _choices(config: Any, kept: Kept) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Entries that may hold the sizes of groups: whole multiples of their units, shrunk as the groups were."""
    layers = getattr(config, "num_hidden_layers", 1)
    stacks: dict[tuple[str, int], dict[int, int]] = {}
    for name, (units, left) in kept.items():
        place = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        stacks.setdefault((re.sub(r"\d+", "*", name), units), {})[int(place[1]) if place else 0] = left
    entries = {
        name: value
        for name, value in config.to_dict().items()
        if (value is None or (type(value) is int and value > 1)) and not HEAD_SIZE.search(name)
    }  # None often stands for a multiple of another entry
    changes = {
        (name, tuple((value or units) // units * own.get(layer, units) for layer in range(layers)))
        for (_, units), own in stacks.items()
        for name, value in entries.items()
        if (value or units) % units == 0
    }
    yield from sorted(changes)


def _off(model: Any, wanted: Shapes, changes: Entries) -> dict[str, Any] | None:
    """Tensors whose shapes differ from the wanted ones, with their shapes; None where no model can be built so.

    A model that was built without one of its heads (`add_pooling_layer=False`) has fewer tensors than its configuration
    describes; only the tensors that it has are compared.
    """
    split = [path for path, module in model.named_modules() if isinstance(module, SplitAttention)]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = split_(type(model)(configured(model.config, changes)), split)
    except Exception:  # noqa: BLE001 - whatever the model's own code raises at sizes that do not fit together
        return None
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    return {name: shapes.get(name) for name, shape in wanted.items() if shapes.get(name) != shape}


def configured(config: Any, changes: Entries) -> Any:
    """A configuration with some entries changed: for all layers at once where they agree, layer by layer otherwise.

    Raises:
        PlanError: Layers differ and the installed transformers knows no `per_layer_config`.
    """
    new = copy.deepcopy(config)
    by_layer: dict[int, dict[str, int]] = {}
    for entry, values in changes.items():
        if len(set(values)) == 1:
            setattr(new, entry, values[0])
            continue
        for layer, value in enumerate(values):
            by_layer.setdefault(layer, {})[entry] = value
    if by_layer:
        if not hasattr(new, "per_layer_config"):
            raise PlanError(
                "plan",
                law="the layers of a stack are equally wide, in this version of transformers",
                got=f"several values of {next(iter(by_layer[0]))}",
                cure="compress with Interpolative(uniform=True)",
            )
        new.per_layer_config = by_layer
    return new

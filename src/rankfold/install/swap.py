"""Replacement of modules by others, which leaves a model as it was where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import narrow_
from rankfold.layers import swap, tensor
from rankfold.layers.tied import heads_of
from rankfold.plan import Plan


def train_as_(new: nn.Module, old: nn.Module) -> None:
    """Give a module `requires_grad` of the layer whose place it takes: its biases as the bias, all else as the weight.

    Args:
        new: A shell, or a layer like the old one; changed.
        old: The layer, which has a weight.
    """
    for name, parameter in new.named_parameters():
        own = getattr(old, "bias", None) if name.rpartition(".")[2] == "bias" else None
        own = own if isinstance(own, torch.Tensor) else tensor(old, "weight")
        parameter.requires_grad_(own.requires_grad)


def take_over(model: nn.Module, changed: nn.Module, plan: Plan) -> nn.Module:
    """Turn a model into a changed copy of it, in place.

    Args:
        model: The original. Parameters that the plan neither cuts nor replaces are the same objects afterwards.
        changed: The copy, after the plan was carried out.
        plan: The plan.

    Returns:
        The root, which is a new module where the model itself is a replaced layer.
    """
    new = dict(changed.named_modules(remove_duplicate=False))
    replaced = {}
    heads = heads_of(model)
    paths = {decision.site for decision in plan.changes}
    paths |= {heads[path] for path in paths if path in heads}
    with undone_on_failure(model) as values:
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if path in plan.stands or path in paths:
                replaced[id(module)] = new[path]
            elif path in new and type(new[path]) is type(module):
                _take_tensors(module, new[path], values)
        narrow_(model, {name: {} for name in plan.cuts}, plan.attributes)  # the tensors are narrow; the numbers follow
        return swap(model, replaced)


def _take_tensors(module: nn.Module, new: nn.Module, before: list[tuple[Tensor, Tensor]]) -> None:
    """A module's own tensors become those of another: by value where the shape is the same, else the tensor itself.

    Args:
        module: Module that is changed.
        new: Module that holds the new tensors.
        before: List to which each tensor that is written into is added, with a copy of its old value.
    """
    registers: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (module._parameters, new._parameters),
        (module._buffers, new._buffers),
    ]
    with torch.no_grad():
        for old, own in registers:
            for name, value in old.items():
                if value is None or own[name] is None or own[name].shape != value.shape:
                    old[name] = own[name]
                elif not torch.equal(value, own[name]):
                    before.append((value, value.clone()))
                    value.copy_(own[name])


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context that leaves a model as it was if a change of it fails or is stopped by Ctrl-C.

    Yields:
        A list for the tensors that are written into, each with a copy of its old value. Modules, their registers and
        attributes are remembered by the context itself.
    """
    own = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), [(getattr(m, name), dict(getattr(m, name))) for name in own]) for m in model.modules()]
    values: list[tuple[Tensor, Tensor]] = []
    try:
        yield values
    except BaseException:
        for module, attributes, registers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for register, held in registers:
                register.clear()
                register.update(held)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise

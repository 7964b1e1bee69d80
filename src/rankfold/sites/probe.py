"""One forward with a stand-in at every layer, which records its calls, their sizes, and the code that reads it.

A layer that is replaced is no longer an `nn.Linear`: code outside it that reads its weight, its dtype or its stride
would break. The stand-in is what the replacement will be, an `nn.Sequential`, and records every other attribute that
is read from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.cost.counted import run_one
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import is_out_of_memory
from rankfold.layers import Adapter, input_of
from rankfold.layers.calls import rows_of

Calls = list[tuple[tuple[int, ...], int]]


@dataclass
class Seen:
    """Record of a layer in one forward.

    Attributes:
        calls: Spatial size of the input, and number of times the layer is applied in it per sample, of every call.
        rows: Number of entries per sample of the axis of samples, of every call: 1, or several, as for windows.
        misuse: Reason why a replacement would break the code around the layer; None where it would not.
        by_batch: True if one sample alone does not reach the layer, and the whole batch does.
        strange: True if some call had other arguments than one plain tensor; no size is known then.
    """

    calls: Calls = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    misuse: str | None = None
    by_batch: bool = False
    strange: bool = False


class _StandIn(nn.Sequential):
    """The layer inside an `nn.Sequential` that notes every call, and every attribute an `nn.Sequential` lacks."""

    def __init__(self, layer: nn.Module, adapter: Adapter, seen: Seen, names: dict[int, str]) -> None:
        vars(self).update(_layer=layer, _adapter=adapter, _seen=seen, _names=names)  # before __getattr__ reads them
        super().__init__(layer)
        self.train(layer.training)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Note the size of the input, and pass it on."""
        inputs = input_of(args, options)
        alone = len(args) + len(options) == 1
        if alone and isinstance(inputs, Tensor) and not inputs.is_nested and inputs.layout is torch.strided:
            read = self._adapter.read(self._layer, inputs)
            self._seen.calls.append(self._adapter.sample_size(self._layer, read))
            self._seen.rows.append(rows_of(self._adapter, self._layer, read))
        else:
            self._seen.strange = True
            given = ", ".join([*(type(value).__name__ for value in args), *options])
            self._note(f"it is called with ({given}) where a replacement takes one plain tensor")
        return self._layer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self._layer, name)
        reader = sys._getframe(1).f_locals.get("self")
        owner = self._names.get(id(reader))
        whose = "other code" if owner is None else f"the code of {owner!r}" if owner else "the model's own code"
        self._note(f"its {name} is also read by {whose}")
        return value

    def _note(self, misuse: str) -> None:
        if self._seen.misuse is None:
            self._seen.misuse = f"read elsewhere: {misuse}"


def observe(model: nn.Module, example: Batch, layers: dict[int, tuple[nn.Module, Adapter]]) -> dict[int, Seen]:
    """Run the model once with stand-ins at the layers.

    The layers are put back afterwards, whatever happens.

    Args:
        model: The model; it is known to run on the example.
        example: One batch; its first sample is run.
        layers: Layers to look at, each with its adapter, by identity.

    Returns:
        The record of each layer, by identity. A layer that the forward reaches other than through its place in the
        module tree (from a list, a closure) has no calls.
    """
    seen = _seen(model, example, layers)
    missed = {key: layer for key, (layer, _) in layers.items() if not seen[key].calls and seen[key].misuse is None}
    if missed and batch_size(example) > 1:
        alone = take(example, torch.arange(1))
        for key in _reached(model, example, missed) - _reached(model, alone, missed):
            seen[key].by_batch = True
    return seen


def _reached(model: nn.Module, batch: Batch, layers: dict[int, nn.Module]) -> set[int]:
    """The layers that the forward on a batch calls, by whatever way; all of them where the forward fails."""
    reached: set[int] = set()

    def note(layer: nn.Module, args: Any) -> None:
        reached.add(id(layer))

    handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        with evaluating(model):
            run(model, to_device(batch, device_of(model)))
    except Exception as cause:  # the model is bound to its batch size: nothing is known
        if is_out_of_memory(cause):
            raise
        return set(layers)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _seen(model: nn.Module, example: Batch, layers: dict[int, tuple[nn.Module, Adapter]]) -> dict[int, Seen]:
    try:
        return _observe(model, example, layers)
    except Exception as cause:  # some code refuses a stand-in: find out which, one by one
        if is_out_of_memory(cause):
            raise
    refused: dict[int, Seen] = {}
    for key, layer in layers.items():
        try:
            _observe(model, example, {key: layer})
        except Exception as cause:  # whatever the model's own code raises
            if is_out_of_memory(cause):
                raise
            refused[key] = _refused(cause)
    rest = {key: layer for key, layer in layers.items() if key not in refused}
    try:
        return {**_observe(model, example, rest), **refused}
    except Exception as cause:  # stand-ins pass one by one, but not together
        if is_out_of_memory(cause):
            raise
        return {key: refused.get(key, _refused(cause)) for key in layers}


def _refused(cause: Exception) -> Seen:
    text = f"{type(cause).__name__}: {cause}".splitlines()[0][:120]
    return Seen(misuse=f"read elsewhere: the model fails with the layer replaced ({text})")


def _observe(model: nn.Module, example: Batch, layers: dict[int, tuple[nn.Module, Adapter]]) -> dict[int, Seen]:
    names = {id(module): path for path, module in model.named_modules()}
    seen = {key: Seen() for key in layers}
    stand_ins = {key: _StandIn(layer, adapter, seen[key], names) for key, (layer, adapter) in layers.items()}
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and id(child) in stand_ins
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = stand_ins[id(child)]
        samples = run_one(stand_ins.get(id(model), model), example, watched=partial(_afresh, seen))
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
    for each in seen.values():
        each.calls = [(size, max(1, round(count / samples))) for size, count in each.calls if not each.strange]
        each.rows = [rows // samples for rows in each.rows if rows % samples == 0]
    return seen


@contextmanager
def _afresh(seen: dict[int, Seen]) -> Iterator[None]:
    """Context of a new try, in which the records of an earlier one are deleted."""
    for each in seen.values():
        each.calls, each.rows, each.misuse, each.strange = [], [], None, False
    yield


def paths_of(model: nn.Module) -> Iterable[tuple[str, nn.Module, tuple[str, ...]]]:
    """Each module once: its first path, itself, and its other paths."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for path, module in model.named_modules():
        yield path, module, tuple(paths[id(module)][1:])

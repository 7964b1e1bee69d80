"""Copies of a model that are models of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from rankfold.cost.counted import run_one
from rankfold.data.batches import Batch
from rankfold.data.running import evaluating, run
from rankfold.errors import ModelError

HALF = (torch.float16, torch.bfloat16)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        ModelError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as cause:
        raise ModelError(
            type(model).__name__,
            law="the model can be copied, since the original is left untouched",
            got=str(cause),
            cure="use rankfold.apply_, which changes the model in place",
        ) from cause


def check_copy(model: nn.Module, example: Batch) -> None:
    """Refuse a model whose copy is not a model of its own.

    A function that the model keeps (a lambda, a bound method) is not copied: it goes on calling the original's layers,
    and a layer that was replaced in the copy would never run.

    Raises:
        ModelError: The copy has other weights, or calls a layer of the original.
    """
    copy_of = copied(model)
    ours, theirs = model.state_dict(), copy_of.state_dict()
    differing = next((name for name in {**ours, **theirs} if not _equal(ours.get(name), theirs.get(name))), None)
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: called.append(path))
        for path, module in model.named_modules()
    ]
    try:
        if differing is None:
            run_one(copy_of, example)
    finally:
        for handle in handles:
            handle.remove()
    if differing is not None or called:
        raise ModelError(
            type(model).__name__,
            law="a deep copy has the same weights and calls its own layers",
            got=f"another {differing!r}" if called == [] else f"a copy that calls {called[0]!r} of the original",
            cure="write what the model keeps in a lambda or bound method as a method, or use rankfold.apply_",
        )


def in_single(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """The model and its batch with float32 for half precision, where the model runs in float32; else as they are.

    Half precision hides a fault behind its rounding.
    """
    if not any(parameter.dtype in HALF for parameter in model.parameters()):
        return model, batch
    wide = _pytree.tree_map_only(Tensor, lambda leaf: leaf.float() if leaf.dtype in HALF else leaf, batch)
    try:
        single = copied(model).float()
        with evaluating(single):
            run(single, wide)
    except Exception:  # noqa: BLE001 - code that names a dtype; it is then tried as it is
        return model, batch
    return single, wide


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two entries of state dicts hold the same bytes, where they have bytes of their own."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return type(ours) is type(theirs)
    if is_lazy(ours) or ours.layout is not torch.strided or type(ours.data) is not Tensor or ours.is_quantized:
        return True
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    mine, other = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (ours, theirs))
    return torch.equal(mine, other)

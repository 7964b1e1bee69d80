"""Which attention of a model is split into linear layers: that whose split changes nothing, by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import is_out_of_memory
from rankfold.graph.trace import followed_output
from rankfold.layers.splitting import attentions, split_at
from rankfold.linalg.precision import full_products
from rankfold.sites.copies import in_single

TRIED = 16  # samples of a batch that are run at most, where the model takes a batch of any size
TOLERANCE = 1e-3  # difference of an entry that rounding explains, relative to it and to the entries' median
STEPS = 64  # `eps` of the dtype that rounding explains, where these are more


@dataclass(frozen=True, eq=False)
class Split:
    """A model whose attention is split where it can be.

    Attributes:
        model: A copy that shares all other tensors with the original, or the very original where nothing is split.
        paths: Paths of the attention that is split.
        whole: Reasons why other attention is left as it is, by path.
    """

    model: nn.Module
    paths: tuple[str, ...]
    whole: dict[str, str]

    @classmethod
    def at(cls, model: nn.Module, paths: Sequence[str]) -> Split:
        """The split that a plan asks for, without a trial."""
        split = split_at(model, paths)
        reason = "unsupported: attention that is not split, which the plan does not ask for"
        return cls(split, tuple(paths), {path: why or reason for path, why in attentions(split).items()})


def split_where_same(model: nn.Module, example: Batch) -> Split:
    """Split the attention of a copy of a model, where the copy computes on an example what the model computes.

    Whatever the code around an attention does with it, such as reading its parameters or its weights of attention, is
    seen by this alone. Where the model fails or computes something else with all of it split, one attention after
    another is split too, as long as that changes nothing. Products have all their bits meanwhile.

    Args:
        model: The model, left untouched; it is known to run on the example.
        example: One batch.

    Returns:
        The split; its model is the very same object where there is nothing to split.
    """
    found = attentions(model)
    whole = {path: why for path, why in found.items() if why is not None}
    free = [path for path, why in found.items() if why is None]
    if not free:
        return Split(model, (), whole)
    tried, example = in_single(model, to_device(example, device_of(model)))
    few = take(example, torch.arange(min(TRIED, batch_size(example))))
    try:
        batch, expected = few, _outputs(tried, few)
    except Exception as cause:
        if is_out_of_memory(cause):
            raise
        try:
            batch, expected = example, _outputs(tried, example)  # the model fixes its batch size
        except Exception as cause:  # or does not run in full precision
            if is_out_of_memory(cause):
                raise
            why = f"not tried: the model fails outside autocast ({type(cause).__name__}: {cause})".splitlines()[0][:200]
            return Split(model, (), {**whole, **dict.fromkeys(free, why)})
    kept, (fault, called) = free, _trial(tried, free, batch, expected)
    if fault is not None:  # which of them is it?
        kept, called = [], set()
        for path in free:
            fault, reached = _trial(tried, [*kept, path], batch, expected)
            if fault is None:
                kept, called = [*kept, path], reached
            else:
                whole[path] = f"read elsewhere: with it split into linear layers {fault}"
    whole |= {path: "not called: the forward on the example does not reach it" for path in kept if path not in called}
    paths = tuple(path for path in kept if path in called)
    return Split(split_at(model, paths), paths, whole)


def _trial(model: nn.Module, paths: Sequence[str], batch: Batch, expected: Any) -> tuple[str | None, set[str]]:
    """What is wrong with a copy in which some attention is split, and which of that its forward reaches.

    Args:
        model: The model.
        paths: Paths of the attention.
        batch: Batch that is run.
        expected: Output of the model on it.

    Returns:
        The fault, None where the copy computes the same; and paths.
    """
    called: set[str] = set()
    strangers: list[str] = []
    with ExitStack() as hooks:

        def watch(module: nn.Module, note: Callable[[str], None], path: str) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda *_: note(path)).remove)

        try:
            split = split_at(model, paths)
            for path in paths:
                watch(split.get_submodule(path), called.add, path)
            for path, module in model.named_modules():
                watch(module, strangers.append, path)
            got = _outputs(split, batch)
        except Exception as cause:  # whatever the model's own code raises
            if is_out_of_memory(cause):
                raise
            return f"the model fails ({type(cause).__name__}: {cause})".splitlines()[0][:200], called
    if strangers:
        return f"a copy of the model still calls {strangers[0]!r} of the model itself", called
    return (None if _same(got, expected) else "the model computes something else"), called


def _outputs(model: nn.Module, batch: Batch) -> Any:
    """The output in eval mode; what is drawn in it is the same each time, and global generators are left alone."""
    device = device_of(model)
    cuda = [] if device.type != "cuda" else [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(cuda), evaluating(model), full_products(device):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)):
            generator.manual_seed(0)
        return run(model, batch)


def _same(got: Any, expected: Any) -> bool:
    """Whether two outputs have one structure, as far as a trace follows it, and equal tensors."""
    mine, structure = _pytree.tree_flatten(followed_output(got))
    theirs, other = _pytree.tree_flatten(followed_output(expected))
    return structure == other and all(_same_leaf(*each) for each in zip(mine, theirs, strict=True))


def _same_leaf(got: Any, expected: Any) -> bool:
    """Whether two leaves of an output are the same: floating tensors up to rounding, where the original is finite."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return type(got) is type(expected)
    if got.shape != expected.shape or got.dtype != expected.dtype or got.is_nested or expected.is_nested:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    finite = torch.isfinite(expected)
    mine, theirs = got[finite].double(), expected[finite].double()
    sizes = theirs[theirs != 0].abs()
    rounding = max(TOLERANCE, STEPS * torch.finfo(expected.dtype).eps)
    middle = float(sizes.median()) if len(sizes) else 1.0
    return torch.allclose(mine, theirs, rtol=rounding, atol=rounding * middle)

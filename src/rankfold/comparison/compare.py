"""Comparison of the original with the compressed model, on data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from rankfold.checks import check_count
from rankfold.comparison.tally import (
    Comparison,
    OutputComparison,
    Tally,
    check_finite,
    check_number,
    check_shapes,
)
from rankfold.data.batches import Batch, batch_size, labels_of, to_device, with_labels
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import as_batches, no_batch, numbered
from rankfold.distributed import ALONE, World
from rankfold.errors import RankfoldError, TraceError, allocating
from rankfold.outputs.taken import LOOKED_AT, Opened, Outputs, Taken, check_outputs, opened, settle, settled
from rankfold.sites.models import check_module

__all__ = [
    "Comparison",
    "OutputComparison",
    "check_finite",
    "check_shapes",
    "compare",
    "labels_of",
    "run_on",
]
_Pair: TypeAlias = tuple[int, Batch, Batch, Any, Any]  # number of a batch, a part, the batch, what both gave


def compare(
    original: nn.Module,
    compressed: nn.Module,
    data: Any,
    *,
    outputs: Outputs | Taken = None,
    at_once: int | None = None,
    world: World = ALONE,
) -> Comparison:
    """Run both models over data and compare their outputs.

    Both run in eval mode and are left as they were. Memory is one batch of outputs (32 samples of them at first, where
    it is guessed what they are). Comparison is in float64. Every floating tensor of a nested output counts, by name;
    what does not (caches and other auxiliary entries, see `Comparison.passed`) is named.

    Args:
        original: The original model.
        compressed: Another model, with outputs of the same shape.
        data: A re-iterable of batches, as for `compress`; labels, where there are any, give top-1 and top-5.
        outputs: Kind of the outputs: `Logits()`, `Values()` or `Embedding()`, or a dict of them by name (None leaves
            one out). None guesses: see `rankfold.outputs.taken.settle`.
        at_once: Samples that run at once, where a batch may be cut into parts; None runs each batch as it is.
        world: The processes that share the data, sample by sample; all get the whole comparison.

    Returns:
        The comparison.

    Raises:
        ModelError: One of the two is no module, or has tensors on meta.
        DataError: No data, outputs of different shapes, labels that are no class of the output, or not one a sample.
        OptionError: `outputs` is not one of these.
        TraceError: A model does not run on a batch; the batch is named.
        NumericsError: An output of either model is not finite; the batch is named.
    """
    original = check_module(original, "original")
    compressed = check_module(compressed, "compressed")
    check_outputs(outputs)
    check_count("at_once", at_once, none=True, cure="try 32")
    batches = as_batches(data)
    if world.size > 1:  # each process has a part only, and all must guess alike
        outputs = settled(original, batches, outputs)
    parts: list[int] = []
    with evaluating(original), evaluating(compressed):
        pairs = (
            (
                number,
                batch,
                whole,
                run_on("original", original, batch, number),
                run_on("compressed", compressed, batch, number),
            )
            for number, batch, whole in _pieces(_shares(batches, parts, world), at_once)
        )
        first = [] if isinstance(outputs, Taken) else _head(pairs)
        taken = outputs if isinstance(outputs, Taken) else _settle(first, outputs)
        tally = Tally(taken, parts)
        for number, batch, whole, mine, theirs in itertools.chain(first, pairs):
            firsts, seconds = taken.of(mine, number), taken.of(theirs, number)
            tally.add(number, batch, firsts, [each.to(firsts[0].device) for each in seconds], whole)
    tally.sum_over(world)
    return tally.result()


def _head(pairs: Iterator[_Pair]) -> list[_Pair]:
    """The first pairs of outputs, of 32 samples at least where there are so many."""
    result: list[_Pair] = []
    samples = 0
    for pair in pairs:
        result.append(pair)
        samples += batch_size(pair[1])
        if samples >= LOOKED_AT:
            break
    if not result:
        raise no_batch()
    return result


def _settle(pairs: Sequence[_Pair], outputs: Outputs) -> Taken:
    """Kinds of the outputs, judged by their first 32 samples, as in `settled`."""
    seen, labels, left = [], [], LOOKED_AT
    for _, batch, _, output, _ in pairs:
        found = opened(output)
        size, label = batch_size(batch), labels_of(batch)
        if left < size:
            found = Opened({n: t[:left] if t.ndim and len(t) == size else t for n, t in found.tensors.items()})
            label = label[:left] if label is not None and label.shape[:1] == (size,) else label
        left -= size
        seen.append(found)
        labels.append(label)
    return settle(seen, outputs, labels)


def run_on(whose: str, model: nn.Module, batch: Batch, number: int) -> Any:
    """A model's output on a batch of the data.

    Raises:
        TraceError: The model does not run on it; the batch is named.
    """
    try:
        with allocating(f"batch {number}", f"a forward pass of the {whose} model on {batch_size(batch)} samples"):
            return run(model, to_device(batch, device_of(model)))
    except RankfoldError:
        raise
    except Exception as cause:
        raise TraceError(
            f"batch {number}",
            law="both models run on every batch of the data",
            got=f"{str(cause)[:300]} from the {whose} model",
            cure="give models of one dtype, and batches of the shape, dtype and keys that they take",
        ) from cause


def _shares(batches: Iterable[Batch], opened_parts: list[int], world: World) -> Iterator[tuple[int, Batch]]:
    """This process's samples of every batch, an even, consecutive part of each, and the batch's number.

    Where there are several processes, a 0 is added to `opened_parts` for each part that some process looks at.
    """
    for number, batch in numbered(batches):
        if world.size == 1:
            yield number, batch
            continue
        parts = torch.arange(batch_size(batch)).tensor_split(world.size)
        for rank, part in enumerate(parts):
            opened_parts.append(0)
            if rank == world.rank and len(part):
                yield number, with_labels(batch, part)


def _pieces(shares: Iterator[tuple[int, Batch]], most: int | None) -> Iterator[tuple[int, Batch, Batch]]:
    """Batches cut into parts of at most so many samples, each with the number of its batch and the whole of it."""
    for number, batch in shares:
        size = batch_size(batch)
        if most is None or size <= most:
            yield number, batch, batch
            continue
        if (labels := labels_of(batch)) is not None:
            check_number(labels, size, number)
        for rows in torch.split(torch.arange(size), most):
            yield number, with_labels(batch, rows), batch

"""The head of a table: its map is solved on what the compressed network feeds it, for the table that both share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rankfold.graph.walk import Arrival
from rankfold.install.tied import head_map, solved, span_of
from rankfold.layers import Adapter, Geometry, adapter_for, tensor
from rankfold.linalg.precision import widen
from rankfold.plan.repair import Lockstep
from rankfold.repair.gather import Gather
from rankfold.repair.moments import SplitMoments
from rankfold.repair.solve import ridge

Gathered = Callable[[nn.Module, Adapter, torch.device], Gather]


def root_of(metric: Tensor) -> Tensor:
    """`F` with `FᵀF = M`, symmetric; of a rank-deficient `M` too."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def gathered(arrival: Arrival, root: Tensor, collect: Gathered) -> SplitMoments:
    """Moments of a head's inputs `h'` in the compressed network and of `F h` in the original.

    The original's logits are `E h + b`, so nothing of the size of the vocabulary is summed up.

    Args:
        arrival: State of the walk before the head.
        root: `F`, shape (d, d).
        collect: Function that makes the collector of a layer.
    """
    inputs = arrival.inputs.compressed[0]
    device = inputs.device
    middle = Geometry(*root.shape).build(device=device, dtype=inputs.dtype)  # never run: it says what is collected
    adapter = adapter_for(middle)
    if adapter is None:
        raise TypeError("linear layers have an adapter")
    own = collect(middle, adapter, device)
    for index, (inputs, original) in enumerate(zip(arrival.inputs.compressed, arrival.inputs.original, strict=True)):
        own.add(index, inputs, widen(original) @ root.to(device).mT)
    return own.summed()


def repaired_map(
    head: nn.Module, shared: Tensor, metric: Tensor | None, root: Tensor, seen: SplitMoments, options: Lockstep
) -> tuple[Tensor, tuple[float, float]]:
    """The map of a head solved on the compressed network's inputs, and its held-out error beside that of `head_map`.

    `W*`, the best map from `h'` to `F h` with a ridge towards `F`, is projected on the span of the table:
    `R = (BᵀMB)⁻¹ BᵀFᵀW*`, the least-squares solution of `F B R ≈ W*`.

    Args:
        head: The original head.
        shared: Table `T`, shape (V, r).
        metric: `M`, as for `head_map`.
        root: `F`, the root of `M`.
        seen: Moments from `gathered`.
        options: The repair's options.

    Returns:
        `R`, shape (r, d), and the relative held-out errors without and with the repair.
    """
    table = tensor(head, "weight")
    best, _ = ridge(seen, 0, root, bias=False, strength=options.ridge, anchor=options.anchor)
    turned = root @ span_of(table, shared)
    after = solved(turned.mT @ turned, turned.mT @ best)
    judge = seen.held if seen.held.count else seen.fit
    energy = float(judge.yy.sum() / max(judge.count, 1)) or 1.0
    before = head_map(table, shared, metric)
    errors = (judge.error(0, turned @ before, None) / energy, judge.error(0, turned @ after, None) / energy)
    return after, errors

"""What methods of two stages share: the unfolded weight, and factors folded back into stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments
from rankfold.factors import MatrixFactors, MirroredFactors, Rank
from rankfold.linalg.spectrum import judged_tail


def judged_projections(basis: Tensor, flat: Tensor, judge: Moments, method: Decomposition) -> Tensor:
    """`judged_errors` of factors `U_r`, `U_rᵀ W`.

    Args:
        basis: Basis `U`, shape (out, k).
        flat: Weight `W`, shape (out, n).
        judge: Moments that the error is measured in.
        method: Method whose errors these are.
    """
    metric = None if judge.gram is None else judge.metric(method).to(flat)
    gradients = None if judge.gradient_gram is None else judge.gradient_gram.to(flat)
    left = judged_tail(basis, flat, metric, gradients)
    return left[1:] / left[0] if float(left[0]) > 0 else torch.zeros_like(left[1:])


def unfold(weight: Tensor, *, mirrored: bool) -> Tensor:
    """`W` (out, in, k…) as out × (in·k…), or mirrored as (out·k…) × in."""
    return weight.movedim(1, -1).flatten(0, -2) if mirrored else weight.flatten(1)


def pair(
    left: Tensor, right: Tensor, shape: Sequence[int], *, mirrored: bool, dtype: object
) -> MatrixFactors | MirroredFactors:
    """Fold the two factors of an unfolded weight back into stages.

    Args:
        left: Left factor, shape (out, r), or mirrored (out·k…, r).
        right: Right factor, shape (r, in·k…), or mirrored (r, in).
        shape: Shape of the canonical weight.
        mirrored: True for the factors of the mirrored unfolding.
        dtype: Dtype of the result.
    """
    out, inputs, *kernel = shape
    ones = [1] * len(kernel)
    rank = right.shape[0]
    if mirrored:
        left = left.reshape(out, *kernel, rank).movedim(-1, 1)
        right = right.reshape(rank, inputs, *ones)
        return MirroredFactors(left.to(dtype).contiguous().clone(), right.to(dtype).contiguous().clone())  # type: ignore[call-overload]
    left, right = left.reshape(out, rank, *ones), right.reshape(rank, inputs, *kernel)
    return MatrixFactors(left.to(dtype).contiguous().clone(), right.to(dtype).contiguous().clone())  # type: ignore[call-overload]


def projection_changes(basis: Tensor, flat: Tensor, gradient: Tensor) -> Tensor:
    """`⟨G, U_rU_rᵀ W − W⟩ = −Σ_{i>r} u_iᵀ G Wᵀ u_i` at every rank from 1 on.

    Args:
        basis: Basis `U`, shape (out, k), of the range of `W`.
        flat: Weight `W`, shape (out, n).
        gradient: Gradient `G`, shape (out, n).
    """
    each = ((basis.mT @ gradient) * (basis.mT @ flat)).sum(1)
    left = each.flip(0).cumsum(0).flip(0)
    return -torch.cat([left[1:], left.new_zeros(1)])


def projected_pair(basis: Tensor, weight: Tensor, rank: Rank, dtype: torch.dtype) -> MatrixFactors:
    """Factors `U_r`, `U_rᵀ W`.

    Args:
        basis: Basis `U`, shape (out, k).
        weight: Canonical weight `W` in the work dtype.
        rank: Number of vectors `r`.
        dtype: Dtype of the factors.
    """
    kept = basis[:, : rank if isinstance(rank, int) else 0]
    factors = pair(kept, kept.mT @ weight.flatten(1), weight.shape, mirrored=False, dtype=dtype)
    return MatrixFactors(*factors.stages()[::-1])


def max_pair_rank(shape: Sequence[int], *, mirrored: bool) -> int:
    """The smaller side of the unfolding."""
    out, inputs, *kernel = shape
    taps = 1
    for size in kernel:
        taps *= size
    return min(out * taps, inputs) if mirrored else min(out, inputs * taps)


def refuses_mirrored(shape: Sequence[int]) -> str | None:
    """Without a kernel the mirrored form is the plain one."""
    return None if any(size > 1 for size in shape[2:]) else "the mirrored form needs a kernel larger than 1"

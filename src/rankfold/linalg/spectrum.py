"""Errors of all ranks at once, from singular values or an ordered orthonormal basis."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale, widen


def tail_energy(s: Tensor) -> Tensor:
    """Relative squared error of keeping the first r singular values, for every r.

    `e_r = Σ_{i>r} s_i² / Σ_i s_i²` (Eckart–Young).

    Args:
        s: Singular values, shape (k,), descending, any scale.

    Returns:
        Shape (k + 1,): `e_0 = 1`, `e_k = 0`, never growing. A zero spectrum has no error at any rank.
    """
    return _tail((s / power_of_two_scale(s)).square())


def explained_tail(projected: Tensor, total: Tensor, *, block: int) -> Tensor:
    """Relative squared error left after projecting onto the first r blocks of an orthonormal basis, for every r.

    Args:
        projected: Product `M Q`, shape (m, k·block), `Q` with orthonormal columns in order of the ranks.
        total: Energy `‖M‖_F²`, a scalar.
        block: Number of columns that a rank adds.

    Returns:
        Shape (k + 1,), from 1 downwards, never growing; zeros where `total` is 0.
    """
    energy = projected.square().sum(0).reshape(-1, block).sum(1)
    explained = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    if float(total) <= 0:
        return torch.zeros_like(explained)
    return (1 - explained / total).clamp(0, 1)


def _tail(energy: Tensor) -> Tensor:
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    if float(tail[0]) <= 0:
        return torch.zeros_like(tail)
    return tail / tail[0]


def judged_tail(basis: Tensor, weight: Tensor, gram: Tensor | None, gradient_gram: Tensor | None) -> Tensor:
    """Energy of what projections onto the first r vectors of a basis leave of a map: `tr(G D A Dᵀ)`.

    `D = (I − U_rU_rᵀ) W`. With `H = (UᵀGU) ∘ (Uᵀ W A Wᵀ U)` it is the sum of `H` over `i, j > r`; for `G = I`
    the diagonal alone is left.

    Args:
        basis: Basis `U`, shape (out, k), with orthonormal columns that span the range of `W`.
        weight: Weight `W`, shape (out, n).
        gram: Second moment `A` of the inputs, shape (n, n); None is `I`.
        gradient_gram: Gram `G` of the output gradients, shape (out, out); None is `I`.

    Returns:
        Shape (k + 1,), for r = 0 to k.
    """
    rows = basis.mT @ weight
    energy = rows @ rows.mT if gram is None else rows @ gram @ rows.mT
    if gradient_gram is not None:
        return tail_sums(energy * (basis.mT @ gradient_gram @ basis))
    left = energy.diagonal().flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)]).clamp_min(0)


def tail_sums(matrix: Tensor) -> Tensor:
    """Sum of `H` over `i, j > r`, for r = 0 to k, clamped at 0.

    Args:
        matrix: Matrix `H`, shape (k, k).
    """
    left = matrix.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([left, left.new_zeros(1)]).clamp_min(0)


def weighted_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output `tr(W A Wᵀ)` of a linear map on inputs with second moment `A`.

    Args:
        weight: Weight `W`, shape (out, in).
        gram: Second moment `A` of the inputs, shape (in, in).

    Returns:
        A scalar in the work dtype, clamped at 0.
    """
    work = widen(weight)
    return ((work @ widen(gram)) * work).sum().clamp_min(0)

"""Canonical polyadic decomposition of a tensor of three modes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.errors import NumericsError
from rankfold.linalg.modes import basis, times
from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.whitening import solve_positive

PULL = 1e-7  # weight of the factors of the last sweep, beside components of length 1: keeps every solve regular
CANCELLING = 1e3  # energy of all components over that of the tensor from which they cancel each other
DIRECT = 1e-6  # share of the energy below which an error is computed from what is left of the tensor
LINE_EVERY = 4  # sweeps from one step along the last change to the next


@dataclass(frozen=True, eq=False)
class Components:
    """Rank-one terms `Σ_r a_r ∘ b_r ∘ c_r` of a tensor.

    Attributes:
        factors: Matrices of shape (n_m, R), one per mode; the columns of all but the first have length 1.
    """

    factors: tuple[Tensor, Tensor, Tensor]

    @property
    def rank(self) -> int:
        """Number `R` of terms."""
        return self.factors[0].shape[1]

    def tensor(self) -> Tensor:
        """The sum of the terms."""
        first, second, third = self.factors
        rows = second[:, None] * third  # b × c × R
        tensor: Tensor = torch.tensordot(first, rows, ([1], [2]))
        return tensor

    def first(self, count: int) -> Components:
        """The first terms."""
        first, second, third = (factor[:, :count] for factor in self.factors)
        return Components((first, second, third))

    def joined(self, other: Components) -> Components:
        """The terms of both."""
        first, second, third = (torch.cat(pair, 1) for pair in zip(self.factors, other.factors, strict=True))
        return Components((first, second, third))


def slice_components(tensor: Tensor, rank: int) -> Components:
    """Terms in closed form: the slices along the rotated third mode, each by its singular value decomposition.

    In the basis of the unfolding along the third mode (HOSVD) the slices are orthogonal to each other, and so are the
    terms `σ u ∘ v ∘ e` of all slices. The R largest of them are taken: error `Σ` of the squares of the others, which
    never grows with the rank and is 0 at `R = n_3 · min(n_1, n_2)`.

    Args:
        tensor: Tensor, shape (n_1, n_2, n_3); the third mode is best the shortest.
        rank: Number of terms.
    """
    turned = basis(tensor, 2)
    slices = times(tensor, turned.mT, 2).movedim(2, 0)
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)
    order = s.flatten().argsort(descending=True, stable=True)[:rank]
    piece, place = order // s.shape[1], order % s.shape[1]
    return Components((u[piece, :, place].mT * s.flatten()[order], vh[piece, place].mT, turned[:, piece]))


def drawn_components(tensor: Tensor, rank: int, seed: int) -> Components:
    """Terms to start from at random: of the first mode, which is solved before it is read, zeros; normal entries else.

    Args:
        tensor: Tensor.
        rank: Number of terms.
        seed: Seed of a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    others = [torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape[1:]]
    second, third = (torch.nn.functional.normalize(each, dim=0).to(tensor) for each in others)
    return Components((tensor.new_zeros(len(tensor), rank), second, third))


def alternate(tensor: Tensor, start: Components, *, sweeps: int, tolerance: float) -> tuple[Components, float]:
    """Alternating least squares: each mode's factors in turn, the others fixed.

    A solve is pulled slightly to the factors it starts from (a proximal step), so the error never grows and collinear
    components do no harm. Every few sweeps a step further along the last change is tried. Components of a tensor
    whose best approximation does not exist grow without bound and cancel each other: sweeps end before their energy is
    1,000 times the tensor's.

    Args:
        tensor: Tensor, shape (n_1, n_2, n_3).
        start: Terms to start from.
        sweeps: Largest number of sweeps.
        tolerance: Sweeps end when the squared error falls by less than this share of itself.

    Returns:
        Terms, and their squared error over the tensor's energy.

    Raises:
        NumericsError: An element is NaN or infinite.

    References:
        Carroll and Chang, Psychometrika 35, 1970; Navasca, De Lathauwer, Kindermann, EUSIPCO 2008, for the proximal
        step; Rajih, Comon, Harshman, SIAM J. Matrix Anal. Appl. 30, 2008, for the line search, of which we try one
        length.
    """
    scale = power_of_two_scale(tensor)
    work = tensor / scale
    total = float(work.square().sum())
    if not total < float("inf"):
        raise NumericsError(
            f"CP of a tensor {tuple(tensor.shape)}",
            law="every element is finite",
            got=f"{int((~torch.isfinite(tensor)).sum())} NaN or infinite",
            cure="look at the weight and the moments it was made from",
        )
    if total <= 0:
        return start, 0.0
    best = Components((start.factors[0] / scale, start.factors[1], start.factors[2]))
    error = squared_distance(work, best)
    before = best
    for sweep in range(sweeps):
        now, reached = _sweep(work, best, total)
        if sweep % LINE_EVERY == LINE_EVERY - 1:
            now, reached = _along(work, before, now, reached, (sweep + 1) ** (1 / 3))
        cancelling = float(now.factors[0].square().sum()) > CANCELLING * total
        if cancelling or not reached <= error:
            break
        before, best, gained = best, now, error - reached
        error = reached
        if gained <= tolerance * error:
            break
    return Components((best.factors[0] * scale, best.factors[1], best.factors[2])), error / total


def _sweep(work: Tensor, start: Components, total: float) -> tuple[Components, float]:
    """One solve of each mode, the first one last, so that it holds the lengths; and the squared error then.

    The error is `‖T‖² − 2⟨A, S⟩ + ⟨A G, A⟩` for the last factor `A`, the Gram `G` of the other two and `S`, the tensor
    seen through them; where that is little beside `‖T‖²` it is computed from the rest itself.
    """
    factors = list(start.factors)
    error = total
    for mode in (1, 2, 0):
        others = [other for other in range(3) if other != mode]
        for other in others:  # the lengths go to the mode that is solved
            lengths = torch.linalg.vector_norm(factors[other], dim=0)
            lengths = torch.where(lengths > 0, lengths, 1.0)
            factors[other], factors[mode] = factors[other] / lengths, factors[mode] * lengths
        left, right = (factors[other] for other in others)
        gram = (left.mT @ left) * (right.mT @ right)
        turned = work.movedim(mode, 0)
        seen = (
            torch.einsum("nab,ar,br->nr", turned, left, right)
            if _small(turned, left)
            else _product(turned, left, right)
        )
        pulled = gram.clone()
        pulled.diagonal().add_(PULL)
        factors[mode] = solve_positive(pulled, (seen + PULL * factors[mode]).mT).mT
        if mode == 0:
            error += float(((factors[0] @ gram - 2 * seen) * factors[0]).sum())
    first, second, third = factors
    found = Components((first, second, third))
    return found, error if error > DIRECT * total else squared_distance(work, found)


def _small(turned: Tensor, left: Tensor) -> bool:
    return turned.shape[1] * turned.shape[2] * left.shape[1] <= 1 << 16


def _product(turned: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`Σ_{a,b} T[n, a, b] left[a, r] right[b, r]`, by one matrix product over the longer of the two modes."""
    long, short, axis = (left, right, 1) if len(left) >= len(right) else (right, left, 2)
    partly: Tensor = torch.tensordot(turned, long, ([axis], [0]))  # n × short × R
    return (partly * short).sum(1)


def _unit(first: Tensor, second: Tensor, third: Tensor) -> Components:
    """Components whose lengths are in the first mode."""
    for factor in (second, third):
        lengths = torch.linalg.vector_norm(factor, dim=0)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        first = first * lengths
        factor /= lengths
    return Components((first, second, third))


def _along(work: Tensor, before: Components, now: Components, error: float, step: float) -> tuple[Components, float]:
    """A step further along the change of the last sweep, where that is better; and its squared error."""
    first, second, third = (
        new + (step - 1) * (new - old) for new, old in zip(now.factors, before.factors, strict=True)
    )
    further = _unit(first, second, third)
    reached = squared_distance(work, further)
    return (further, reached) if reached < error else (now, error)


def squared_distance(tensor: Tensor, components: Components) -> float:
    """Squared error of a sum of terms."""
    return float((tensor - components.tensor()).square().sum())

"""Truncated singular value decomposition of the weight alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments, canonical
from rankfold.errors import OptionError
from rankfold.factors import MatrixFactors, MirroredFactors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import judged_tail, tail_energy
from rankfold.linalg.svd import svd
from rankfold.registry import register


@register("svd")
@dataclass(frozen=True)
class SVD(Decomposition):
    """Best rank-r approximation of the weight in the Frobenius norm; needs no data.

    `M = UΣVᵀ ≈ (U_r Σ_r^{1/2}) (Σ_r^{1/2} V_rᵀ)` with `M = W` unfolded to out × (in·k…), or, mirrored, to
    (out·k…) × in. Work is done in float64; a zero weight gives zero factors; half precision is widened.

    Attributes:
        mirrored: Put the kernel into the second stage: `1×1 → r`, then `k×k → out`. No case for linear layers, where
            both forms are the same.

    References:
        Eckart and Young, Psychometrika 1, 1936. As the baseline of arXiv 2505.24469, whose exact unfolding is not
        known to us: we offer both.
    """

    mirrored: bool = False

    def __post_init__(self) -> None:
        check_flag(self.mirrored, "SVD.mirrored")

    @property
    def form(self) -> str:
        """ "mirrored" or "matrix"."""
        return "mirrored" if self.mirrored else "matrix"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Mirrored needs a kernel."""
        return refuses_mirrored(shape) if self.mirrored else None

    def candidates(self, shape: Sequence[int]) -> list[Rank]:
        """1 to the smaller side of the unfolding."""
        return list(range(1, max_pair_rank(shape, mirrored=self.mirrored) + 1))

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors | MirroredFactors:
        """See `Decomposition.decompose`; `moments` are not read."""
        work = canonical(weight, rank, self)
        u, s, vh = svd(unfold(work, mirrored=self.mirrored))
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
        return pair(left, right, work.shape, mirrored=self.mirrored, dtype=weight.dtype)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """`Σ_{i>r} σ_i² / Σ σ_i²` at every rank."""
        return tail_energy(svd(unfold(weight, mirrored=self.mirrored))[1])[1:]

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """In closed form for the matrix form."""
        if self.mirrored:
            return super().judged_errors(weight, moments, judge)
        flat = widen(weight).flatten(1)
        return judged_projections(svd(flat)[0], flat, judge, self)


def judged_projections(basis: Tensor, flat: Tensor, judge: Moments, method: Decomposition) -> Tensor:
    """`judged_errors` of factors `U_r`, `U_rᵀ W`.

    Args:
        basis: `U`, shape (out, k).
        flat: `W`, shape (out, n).
        judge: What the error is measured in.
        method: Whose errors these are.
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
        left: Shape (out, r), or mirrored (out·k…, r).
        right: Shape (r, in·k…), or mirrored (r, in).
        shape: Of the canonical weight.
        mirrored: Which unfolding.
        dtype: Of the result.
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


def check_flag(value: object, place: str) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise OptionError(place, law="True or False", got=repr(value), cure="pass a bool")

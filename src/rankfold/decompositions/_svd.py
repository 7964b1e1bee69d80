"""Truncated singular value decomposition of the weight alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rankfold.checks import check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical
from rankfold.decompositions.unfolding import (
    judged_projections,
    max_pair_rank,
    pair,
    projection_changes,
    refuses_mirrored,
    unfold,
)
from rankfold.factors import MatrixFactors, MirroredFactors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.svd import svd
from rankfold.registry import register


@register("svd")
@dataclass(frozen=True)
class SVD(Decomposition):
    """Best rank-r approximation of the weight in the Frobenius norm; needs no data.

    `M = UΣVᵀ ≈ (U_r Σ_r^{1/2}) (Σ_r^{1/2} V_rᵀ)` with `M = W` unfolded to out × (in·k…), or, mirrored, to
    (out·k…) × in. Work is done in float64; a zero weight gives zero factors; half precision is widened.

    Attributes:
        mirrored: True if the kernel is in the second stage: `1×1 → r`, then `k×k → out`. Linear layers are refused,
            since both forms are the same for them.

    References:
        Eckart and Young, Psychometrika 1, 1936. This is the baseline of arXiv 2505.24469, whose exact unfolding is not
        known to us: we offer both.
    """

    mirrored: bool = False

    def __post_init__(self) -> None:
        check_flag("SVD.mirrored", self.mirrored)

    @property
    def form(self) -> str:
        """ "mirrored" or "matrix"."""
        return "mirrored" if self.mirrored else "matrix"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """The mirrored form needs a kernel."""
        return refuses_mirrored(shape) if self.mirrored else None

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
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

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the unfolded weight."""
        matrix = unfold(weight, mirrored=self.mirrored)
        return (Spectrum(svd(matrix)[1], *matrix.shape),)

    def changes(self, weight: Tensor, moments: Moments, gradient: Tensor) -> Tensor | None:
        """See `Decomposition.changes`; None for the mirrored form."""
        if self.mirrored:
            return None
        flat = widen(weight).flatten(1)
        return projection_changes(svd(flat)[0], flat, gradient)

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """See `Decomposition.judged_errors`; in closed form for the matrix form."""
        if self.mirrored:
            return super().judged_errors(weight, moments, judge)
        flat = widen(weight).flatten(1)
        return judged_projections(svd(flat)[0], flat, judge, self)

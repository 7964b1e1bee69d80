"""Singular value decomposition with inputs scaled by how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.checks import check_number
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical
from rankfold.decompositions.unfolding import judged_projections, max_pair_rank, projected_pair, projection_changes
from rankfold.factors import MatrixFactors, Rank
from rankfold.linalg.precision import power_of_two_scale, widen
from rankfold.linalg.svd import svd
from rankfold.registry import register


@register("asvd")
@dataclass(frozen=True)
class ASVD(Decomposition):
    """Truncated SVD of `W S`, `S = diag(E[x_i²]^{α/2})`: large inputs count more.

    `W S = UΣVᵀ`, `L = U_r`, `R = U_rᵀ W` (equal to `Σ_r V_rᵀ S^{-1}`, without the inverse). It looks at the scales of
    the inputs and not at how they go together, as `WhitenedSVD` does, which is at least as good on the inputs it saw;
    a diagonal has less to learn from few samples.

    Attributes:
        alpha: Exponent `α`, 0 (`SVD`) to 1 (inputs in units of their scale).

    References:
        ASVD, arXiv 2312.05821, with `E|x|` in the place of the root mean square, from which it differs by one factor
        for inputs of one distribution; there `α = 0.5`. We differ in `R = U_rᵀW`, which never divides by a scale.
    """

    alpha: float = 0.5
    needs = ("input-gram", "input-mean")

    def __post_init__(self) -> None:
        check_number("ASVD.alpha", self.alpha, law="an exponent, 0 to 1", cure="try 0.5", high=1)

    @property
    def form(self) -> str:
        """ "matrix"."""
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """1 to the smaller side of the unfolding."""
        return list(range(1, max_pair_rank(shape, mirrored=False) + 1))

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        return projected_pair(self._basis(work.flatten(1), moments), work, rank, weight.dtype)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """`tr(D A Dᵀ)/tr(W A Wᵀ)`, `D = (I − U_rU_rᵀ) W`, at every rank."""
        flat = widen(weight).flatten(1)
        metric = moments.metric(self)
        seen = metric if float(metric.trace()) > 0 else torch.eye(len(metric)).to(metric)
        errors = judged_projections(self._basis(flat, moments), flat, Moments(gram=seen), self)
        return torch.cummin(errors.clamp(0, 1), 0).values

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """See `Decomposition.judged_errors`; in closed form."""
        flat = widen(weight).flatten(1)
        return judged_projections(self._basis(flat, moments), flat, judge, self)

    def changes(self, weight: Tensor, moments: Moments, gradient: Tensor) -> Tensor:
        """See `Decomposition.changes`."""
        flat = widen(weight).flatten(1)
        return projection_changes(self._basis(flat, moments), flat, gradient)

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of `W S`."""
        flat = widen(weight).flatten(1)
        return (Spectrum(svd(self._scaled(flat, moments))[1], *flat.shape),)

    def _basis(self, flat: Tensor, moments: Moments) -> Tensor:
        return svd(self._scaled(flat, moments))[0]

    def _scaled(self, flat: Tensor, moments: Moments) -> Tensor:
        metric = moments.metric(self).to(flat)
        scales = (metric.diagonal() / power_of_two_scale(metric)).clamp_min(0).pow(self.alpha / 2)
        return flat * torch.where(scales.any(), scales, 1.0)

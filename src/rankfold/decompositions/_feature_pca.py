"""Principal components of a layer's outputs, from a covariance that is pooled over groups of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from rankfold.checks import check_count
from rankfold.decompositions._base import CONSTANT, Decomposition, Moments, Spectrum, canonical, check_damping
from rankfold.decompositions.unfolding import judged_projections, max_pair_rank, projected_pair
from rankfold.factors import BiasedMatrixFactors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.whitening import left_spectrum
from rankfold.registry import register


@register("feature-pca")
@dataclass(frozen=True)
class FeaturePCA(Decomposition):
    """`y ≈ U_r U_rᵀ W x + (I − U_rU_rᵀ) E[y]`, `Cov(y) = U Λ Uᵀ`: the outputs in their principal components.

    `Cov(y) = W Σ Wᵀ` with the pooled covariance `Σ = Σ_g (n_g/N) Σ_g` of the inputs in the groups of samples, so what
    differs between groups alone is left to the bias; a layer without one gets one. The batches of calibration data are
    the groups, 32 at most. In lockstep repair, whose moments are of one group, `Σ` is the plain covariance.

    Attributes:
        multiple_of: Number of which ranks are multiples, but for the exact one and those of layers too small for it.
        damping: Ridge added to `Σ`, as a fraction of its mean eigenvalue.

    References:
        Bolaco, arXiv 2405.10616, equations 2 and 4. There the value projection is never cut (`exclude=` here) and a
        kept ratio becomes a rank by `floor(ρ·out·in/(out + in))` to a multiple of 8. We differ in that ratios come from
        a rank selector, and in the inputs' side of the covariance, which is collected in place of the outputs'.
    """

    multiple_of: int = 8
    damping: float = 1e-6
    needs = ("input-gram", "input-mean", "input-groups")

    def __post_init__(self) -> None:
        check_count("FeaturePCA.multiple_of", self.multiple_of, cure="try 8")
        check_damping(self.damping, "FeaturePCA")

    @property
    def form(self) -> str:
        """ "biased-matrix"."""
        return "biased-matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """Multiples up to the smaller side of the unfolding, and that."""
        most = max_pair_rank(shape, mirrored=False)
        return [*range(self.multiple_of, most, self.multiple_of), most]

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any rank from 1 to the smaller side."""
        return type(rank) is int and 1 <= rank <= max_pair_rank(shape, mirrored=False)

    def at_multiples(self, multiple: int) -> FeaturePCA:
        """This method with ranks that are multiples of both."""
        return replace(self, multiple_of=lcm(self.multiple_of, multiple))

    def metric(self, moments: Moments) -> Tensor:
        """The pooled covariance `Σ`, a bias being there in any case.

        One whose trace is below 1e-6 of the second moment's is zero, see `Moments.metric`.
        """
        plain = replace(moments, bias=True).metric(self)
        if moments.groups is None or moments.gram is None:
            return plain
        shares, sums = moments.groups[:, -1], moments.groups[:, :-1]
        scaled = sums / shares.clamp_min(torch.finfo(sums.dtype).tiny).sqrt()[:, None]
        pooled = moments.gram - scaled[shares > 0].mT @ scaled[shares > 0]
        return torch.where(pooled.trace() <= CONSTANT * moments.gram.trace(), 0.0, pooled)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> BiasedMatrixFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        basis, _ = left_spectrum(work.flatten(1), self.metric(moments).to(work), damping=self.damping)
        factors = projected_pair(basis, work, rank, weight.dtype)
        return BiasedMatrixFactors(factors.left, factors.right)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """`Σ_{i>r} λ_i / Σ λ_i` of the damped covariance at the ranks."""
        tail = tail_energy(self.spectra(weight, moments)[0].values)
        return tail[[rank for rank in self.ranks(weight.shape) if isinstance(rank, int)]]

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """See `Decomposition.judged_errors`; in closed form."""
        flat = widen(weight).flatten(1)
        basis, _ = left_spectrum(flat, self.metric(moments).to(flat), damping=self.damping)
        errors = judged_projections(basis, flat, replace(judge, bias=True), self)
        return errors[[rank - 1 for rank in self.ranks(weight.shape) if isinstance(rank, int)]]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of `W Σ^{1/2}`."""
        flat = widen(weight).flatten(1)
        values = left_spectrum(flat, self.metric(moments).to(flat), damping=self.damping)[1]
        return (Spectrum(values, *flat.shape),)

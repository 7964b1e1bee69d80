"""Singular value decomposition with outputs weighted by how much the network feels them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical, check_damping
from rankfold.decompositions.unfolding import max_pair_rank, projected_pair
from rankfold.factors import MatrixFactors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import damped_gram
from rankfold.registry import register


@register("fisher-svd")
@dataclass(frozen=True)
class FisherSVD(Decomposition):
    """Truncated SVD of `F W`, `F = diag(G_oo)^{1/2}`, `G` the Gram of the gradients: least `‖F (W − Ŵ)‖`.

    `F W = UΣVᵀ`, `L = F^{-1} U_r`, `R = U_rᵀ F W`. It looks at each output alone, and at no input; `KroneckerSVD` looks
    at both sides, and at how outputs and inputs go together.

    Attributes:
        damping: Ridge added to `G`, as a fraction of its mean eigenvalue: no output is free.

    References:
        FWSVD, arXiv 2207.00112, with the squared gradients of the weights of a labelled loss, summed by row. We differ
        in the gradients, which are of random projections of the network's output (Gauss–Newton, no labels).
    """

    damping: float = 0.05
    needs = ("gradient-gram",)

    def __post_init__(self) -> None:
        check_damping(self.damping, "FisherSVD")

    @property
    def form(self) -> str:
        """ "matrix"."""
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """1 to the smaller side of the unfolding."""
        return list(range(1, max_pair_rank(shape, mirrored=False) + 1))

    def output_metric(self, moments: Moments) -> Tensor:
        """`diag(G) + λI`: the metric of the outputs that errors are measured in."""
        return damped_gram(moments.gradients(self), damping=self.damping).diagonal().diag()

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        scales = self._scales(work, moments)
        basis = svd(scales[:, None] * work.flatten(1))[0]
        mixed = work * scales.reshape(-1, *[1] * (work.ndim - 1))
        factors = projected_pair(basis, mixed, rank, work.dtype).mixed((1 / scales).diag())
        return MatrixFactors(factors.left.to(weight.dtype), factors.right.to(weight.dtype))

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """`Σ_{i>r} σ_i² / Σ σ_i²` of `F W` at every rank."""
        return tail_energy(self.spectra(weight, moments)[0].values)[1:]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of `F W`."""
        flat = widen(weight).flatten(1)
        return (Spectrum(svd(self._scales(flat, moments)[:, None] * flat)[1], *flat.shape),)

    def _scales(self, work: Tensor, moments: Moments) -> Tensor:
        """The roots `F`, of mean square 1."""
        level = self.output_metric(moments).to(work).diagonal()
        return torch.sqrt(level / level.mean())

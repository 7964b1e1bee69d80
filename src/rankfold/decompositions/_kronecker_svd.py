"""Singular value decomposition in the metric of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical, check_damping
from rankfold.decompositions.unfolding import max_pair_rank, projected_pair
from rankfold.factors import MatrixFactors, Rank
from rankfold.linalg.precision import power_of_two_scale, widen
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.whitening import cholesky, damped_gram, left_spectrum
from rankfold.registry import register


@register("kronecker-svd")
@dataclass(frozen=True)
class KroneckerSVD(Decomposition):
    """Truncated SVD of `G^{1/2} W A^{1/2}`: least error where inputs and outputs are weighted, `tr(G D A Dᵀ)`.

    With `FᵀF = G + λI`, `F W A^{1/2} = UΣVᵀ`, `L = F^{-1} U_r`, `R = U_rᵀ F W`. `A` is the Gram of the inputs, `G` that
    of the gradients. It is what `WhitenedSVD` becomes where gradients are collected, as a method of its own.

    Attributes:
        damping: Ridge added to `A`, as a fraction of its mean eigenvalue.
        output_damping: Ridge added to `G`, as a fraction of its mean eigenvalue: no output direction is free.

    References:
        Martens and Grosse, arXiv 1503.05671, for the factors of the curvature. We differ from the relatives in large
        language models in the gradients, which are of random projections of the network's output (Gauss–Newton, no
        labels).
    """

    damping: float = 1e-6
    output_damping: float = 0.05
    needs = ("input-gram", "input-mean", "gradient-gram")

    def __post_init__(self) -> None:
        check_damping(self.damping, "KroneckerSVD")
        check_damping(self.output_damping, "KroneckerSVD")

    @property
    def form(self) -> str:
        """ "matrix"."""
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """1 to the smaller side of the unfolding."""
        return list(range(1, max_pair_rank(shape, mirrored=False) + 1))

    def output_metric(self, moments: Moments) -> Tensor:
        """`G + λI`: the metric of the outputs that errors are measured in."""
        return damped_gram(moments.gradients(self), damping=self.output_damping)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        root = self._root(work, moments)
        mixed = torch.einsum("po,o...->p...", root, work)
        basis, _ = left_spectrum(mixed.flatten(1), moments.metric(self).to(work), damping=self.damping)
        inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=True)
        factors = projected_pair(basis, mixed, rank, work.dtype).mixed(inverse)
        return MatrixFactors(factors.left.to(weight.dtype), factors.right.to(weight.dtype))

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """`Σ_{i>r} σ_i² / Σ σ_i²` of `F W A^{1/2}` at every rank."""
        return tail_energy(self.spectra(weight, moments)[0].values)[1:]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of `F W A^{1/2}`."""
        flat = widen(weight).flatten(1)
        mixed = self._root(flat, moments) @ flat
        values = left_spectrum(mixed, moments.metric(self).to(flat), damping=self.damping)[1]
        return (Spectrum(values, *flat.shape),)

    def _root(self, work: Tensor, moments: Moments) -> Tensor:
        """`F`, upper triangular, of the Gram without its power of two."""
        metric = self.output_metric(moments).to(work)
        return cholesky(metric / power_of_two_scale(metric)).mT

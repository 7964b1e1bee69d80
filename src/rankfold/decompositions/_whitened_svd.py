"""Truncated singular value decomposition in the metric of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rankfold.checks import check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical, check_damping
from rankfold.decompositions.unfolding import (
    judged_projections,
    max_pair_rank,
    pair,
    projection_changes,
    refuses_mirrored,
)
from rankfold.factors import MatrixFactors, MirroredFactors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.projection import split_basis, split_errors, split_refit
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.whitening import left_spectrum
from rankfold.registry import register


@register("whitened-svd")
@dataclass(frozen=True)
class WhitenedSVD(Decomposition):
    """Best rank-r map on the inputs the layer really sees: least `E‖(W − LR)x‖²`.

    `W A^{1/2} = UΣVᵀ`, `L = U_r`, `R = U_rᵀ W` (equal to `Σ_r V_rᵀ A^{-1/2}` on the range of `A`, without the inverse).
    `A` is the covariance where the layer has a bias (which absorbs the mean output), else the second moment; for a
    convolution `x` is the unfolded patch. Rank-deficient `A` is normal. Work is done in float64.

    The mirrored form has no such closed form, since its first stage reads single pixels: its basis comes from the
    marginal moment of a pixel, and its second stage is then refitted by least squares on the projected patches.

    Attributes:
        mirrored: True if the kernel is in the second stage: `1×1 → r`, then `k×k → out`.
        damping: Ridge added to `A`, as a fraction of its mean eigenvalue.

    References:
        SVD-LLM (arXiv 2403.07378) whitens by a Cholesky factor, which throws on rank-deficient moments; BALF whitens
        convolutions. We differ in the symmetric root through `eigh`, in the covariance where a bias exists, and in
        `R = U_rᵀW`, which never divides by a small eigenvalue.
    """

    mirrored: bool = False
    damping: float = 1e-6
    needs = ("input-gram", "input-mean")

    def __post_init__(self) -> None:
        check_flag("WhitenedSVD.mirrored", self.mirrored)
        check_damping(self.damping, "WhitenedSVD")

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
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        metric = moments.metric(self).to(work)
        _out, inputs, *_kernel = work.shape
        if self.mirrored:
            split, patches = work.flatten(2), metric.reshape(inputs, -1, inputs, metric.shape[0] // inputs)
            basis = split_basis(split, patches, damping=self.damping)[:rank]
            left, right = split_refit(split, patches, basis, damping=self.damping)  # out × r × taps, r × in
            left = left.movedim(1, -1).reshape(-1, right.shape[0])
            return pair(left, right, work.shape, mirrored=True, dtype=weight.dtype)
        flat = work.flatten(1)
        u, _ = left_spectrum(flat, metric, damping=self.damping)
        return pair(u[:, :rank], u[:, :rank].mT @ flat, work.shape, mirrored=False, dtype=weight.dtype)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors in the damped metric: closed form for the matrix form, one Cholesky for the mirrored one."""
        weight = widen(weight)
        metric = moments.metric(self).to(weight)
        if self.mirrored:
            inputs = weight.shape[1]
            split, patches = weight.flatten(2), metric.reshape(inputs, -1, inputs, metric.shape[0] // inputs)
            basis = split_basis(split, patches, damping=self.damping)
            return split_errors(split, patches, basis, damping=self.damping)[1:]
        return tail_energy(left_spectrum(weight.flatten(1), metric, damping=self.damping)[1])[1:]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of `W A^{1/2}`; () for the mirrored form, which truncates another matrix and refits."""
        if self.mirrored:
            return ()
        flat = widen(weight).flatten(1)
        values = left_spectrum(flat, moments.metric(self).to(flat), damping=self.damping)[1]
        return (Spectrum(values, *flat.shape),)

    def changes(self, weight: Tensor, moments: Moments, gradient: Tensor) -> Tensor | None:
        """See `Decomposition.changes`; None for the mirrored form."""
        if self.mirrored:
            return None
        flat = widen(weight).flatten(1)
        basis, _ = left_spectrum(flat, moments.metric(self).to(flat), damping=self.damping)
        return projection_changes(basis, flat, gradient)

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """See `Decomposition.judged_errors`; in closed form for the matrix form."""
        if self.mirrored:
            return super().judged_errors(weight, moments, judge)
        flat = widen(weight).flatten(1)
        basis, _ = left_spectrum(flat, moments.metric(self).to(flat), damping=self.damping)
        return judged_projections(basis, flat, judge, self)

"""Separable form of a 2-d convolution: a vertical, then a horizontal kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.checks import check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, canonical, check_damping
from rankfold.factors import Rank, SpatialFactors
from rankfold.linalg.precision import widen
from rankfold.linalg.projection import split_basis, split_errors, split_refit
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.svd import svd
from rankfold.registry import register


@register("spatial-svd")
@dataclass(frozen=True)
class SpatialSVD(Decomposition):
    """`kh×1 → r`, then `1×kw → out`, from the matrix `(out·kw) × (in·kh)`.

    Plain: truncated SVD of that matrix, best in the Frobenius norm. Whitened: the basis of the first stage comes from
    the marginal moment of a column of the patch, the second stage is refitted by least squares on the projected
    patches (the joint problem has no closed form).

    Attributes:
        whitened: True if the input moments are used.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.

    References:
        Jaderberg, Vedaldi, Zisserman, arXiv 1405.3866, scheme 2. We differ in solving in closed form, and in the
        metric of the inputs when whitened.
    """

    whitened: bool = True
    damping: float = 1e-6

    def __post_init__(self) -> None:
        check_flag("SpatialSVD.whitened", self.whitened)
        check_damping(self.damping, "SpatialSVD")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    @property
    def form(self) -> str:
        """ "spatial"."""
        return "spatial"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only 2-d kernels with both sides above 1 can be separated."""
        if len(shape) == 4 and min(shape[2:]) > 1:
            return None
        return "the spatial form needs a 2-d kernel with both sides above 1"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """The ranks that save weights, `r (in·kh + out·kw) < out·in·kh·kw`, and min(out·kw, in·kh), which is exact."""
        saving, exact = _saving(shape), _exact(shape)
        return [*range(1, min(saving, exact - 1) + 1), exact]

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any rank from 1 to the exact one."""
        return type(rank) is int and 1 <= rank <= _exact(shape)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> SpatialFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        out, inputs, height, width = work.shape
        split = work.reshape(out, inputs * height, width)
        if self.whitened:
            patches = self._patches(moments, split)
            basis = split_basis(split, patches, damping=self.damping)[:rank]
            left, right = split_refit(split, patches, basis, damping=self.damping)
        else:
            u, s, vh = svd(_columns(split))
            root = s[:rank].sqrt()
            right = root[:, None] * vh[:rank]
            left = (u[:, :rank] * root).reshape(out, width, -1).permute(0, 2, 1)
        k = right.shape[0]
        return SpatialFactors(
            left.reshape(out, k, 1, width).to(weight.dtype).contiguous().clone(),
            right.reshape(k, inputs, height, 1).to(weight.dtype).contiguous().clone(),
        )

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Closed form (plain), or one Cholesky factor in the damped metric (whitened); 0 at the exact rank."""
        out, inputs, height, width = weight.shape
        split = widen(weight).reshape(out, inputs * height, width)
        below = len(self.ranks(weight.shape)) - 1
        if below == 0:
            return split.new_zeros(1)
        if not self.whitened:
            errors = tail_energy(svd(_columns(split))[1])[1 : below + 1]
        else:
            patches = self._patches(moments, split)
            basis = split_basis(split, patches, damping=self.damping)[:below]
            errors = split_errors(split, patches, basis, damping=self.damping)[1:]
        return torch.cat([errors, errors.new_zeros(1)])

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the weight as (out·kw) × (in·kh)."""
        out, inputs, height, width = weight.shape
        matrix = _columns(widen(weight).reshape(out, inputs * height, width))
        return (Spectrum(svd(matrix)[1], *matrix.shape),)

    def _patches(self, moments: Moments, split: Tensor) -> Tensor:
        _, rows, width = split.shape
        return moments.metric(self).to(split).reshape(rows, width, rows, width)


def _exact(shape: Sequence[int]) -> int:
    out, inputs, height, width = shape
    return min(out * width, inputs * height)


def _saving(shape: Sequence[int]) -> int:
    """The largest rank whose two stages hold fewer weights than the kernel."""
    out, inputs, height, width = shape
    return (out * inputs * height * width - 1) // (inputs * height + out * width)


def _columns(split: Tensor) -> Tensor:
    """(out, in·kh, kw) as (out·kw) × (in·kh)."""
    out, rows, width = split.shape
    return torch.movedim(split, 1, 2).reshape(out * width, rows)

"""The nuclear norm of a matrix by the Gram of its smaller side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.errors import NumericsError

ROUNDING = 1e-6  # share of the largest singular value below which one is rounding, in the eigenvalues of a float64 Gram


class _NuclearNorm(torch.autograd.Function):
    """`‖M‖_* = Σ σ_i`, with the gradient `U Vᵀ = (M Mᵀ)^{-1/2} M`: eigenvectors of a Gram in place of an SVD."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
        work = wide.detach().to(torch.float64)
        gram = work @ work.mT
        if bool(torch.isfinite(gram).all()):
            values, vectors = torch.linalg.eigh(gram)
        else:  # it has no eigenvectors: the norm is NaN, and the caller names the layer
            values, vectors = torch.full_like(gram[..., 0], torch.nan), gram
        lengths = values.clamp_min(0).sqrt()
        ctx.save_for_backward(wide.detach(), vectors, lengths)
        ctx.turned = wide is not matrix
        norm: Tensor = lengths.sum().to(matrix.dtype)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        wide, vectors, lengths = ctx.saved_tensors
        alive = lengths > ROUNDING * lengths.amax(-1, keepdim=True)
        inverse = torch.where(alive, 1 / torch.where(alive, lengths, 1.0), 0.0)
        root = (vectors * inverse[..., None, :]) @ vectors.mT
        polar = root.to(wide.dtype) @ wide
        gradient: Tensor = grads[0] * (polar.mT if ctx.turned else polar)
        return gradient


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values over all matrices of a batch, with its gradient.

    `σ` are roots of the eigenvalues of the smaller Gram, in float64: a singular value is exact to about 1e-8 of the
    largest, and what is below 1e-6 of that has no gradient.

    Args:
        matrix: Shape (…, m, n).
    """
    norm: Tensor = _NuclearNorm.apply(matrix)  # type: ignore[no-untyped-call]
    return norm


@torch.no_grad()
def soft_threshold(matrix: Tensor, amount: float) -> Tensor:
    """`U max(Σ − amount, 0) Vᵀ`: the proximal step of the nuclear norm.

    Args:
        matrix: Shape (…, m, n).
        amount: What is taken off every singular value.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NumericsError(
            "soft_threshold", law="every weight is finite", got="NaN or infinity", cure="the model has diverged"
        )
    u, s, vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
    shrunk: Tensor = ((u * (s - amount).clamp_min(0)[..., None, :]) @ vh).to(matrix.dtype)
    return shrunk

"""Two-stage maps whose first stage reads part of a patch: a nested basis, and the refit of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.spectrum import explained_tail
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import square_root


def split_basis(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """Ordered basis for the part of a patch that the first stage reads.

    A patch is seen as a matrix `x[a, b]`: `a` is read by the first stage (all of it, at every `b` alike), `b` is left
    for the second. With the marginal second moment `Ā = mean_b E[x_b x_bᵀ]` of `a`, the basis is the right singular
    vectors of `W Ā^{1/2}`, `W` seen as (out·b) × a, mapped back by `Ā^{-1/2}`.

    Args:
        weight: Shape (out, a, b).
        gram: Second moment of whole patches, shape (a, b, a, b).
        damping: Relative damping of `Ā`.

    Returns:
        Shape (k, a), `k = min(a, out·b)`, most important direction first.
    """
    out, a, b = weight.shape
    marginal = torch.diagonal(gram, dim1=1, dim2=3).mean(-1)
    root, inverse_root = square_root(marginal, damping=damping)
    _, _, vh = svd(weight.permute(0, 2, 1).reshape(out * b, a) @ root)
    return vh @ inverse_root


def split_errors(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> Tensor:
    """Relative squared output error at every rank when the second stage is refitted by least squares.

    The nested subspaces of projected patches are orthogonalised once, `A^{1/2}Pᵀ = QR`, so the errors of all ranks
    come from one QR: `e_r = 1 − ‖W A^{1/2} Q_{1..r·b}‖² / ‖W A^{1/2}‖²`.

    Args:
        weight: Shape (out, a, b).
        gram: Shape (a, b, a, b).
        basis: Shape (k, a), as `split_basis` gives it.
        damping: Relative damping of the whole Gram.

    Returns:
        Shape (k + 1,), never growing.
    """
    out, a, b = weight.shape
    root, _ = square_root(gram.reshape(a * b, a * b), damping=damping)
    target = weight.reshape(out, a * b) @ root
    target = target / power_of_two_scale(target)
    lifted = _lift(basis, b) @ root
    norms = torch.linalg.vector_norm(lifted, dim=1, keepdim=True)
    q, _ = torch.linalg.qr((lifted / torch.where(norms > 0, norms, 1.0)).mT)
    projected = target @ q
    missing = len(basis) * b - projected.shape[1]
    if missing > 0:
        projected = torch.nn.functional.pad(projected, (0, missing))
    return explained_tail(projected, target.square().sum(), block=b)


def split_refit(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> Tensor:
    """The second stage that is best in the patch metric, given the first: `L = W A Pᵀ (P A Pᵀ)⁺`.

    Args:
        weight: Shape (out, a, b).
        gram: Shape (a, b, a, b).
        basis: First stage, shape (r, a).
        damping: Relative damping of the whole Gram, as in `split_errors`.

    Returns:
        Shape (out, r, b).
    """
    out, a, b = weight.shape
    root, _ = square_root(gram.reshape(a * b, a * b), damping=damping)
    lifted = _lift(basis, b) @ root  # (r·b) × (a·b)
    scale = power_of_two_scale(root)
    solution: Tensor = torch.linalg.pinv(lifted.mT / scale, rtol=1e-10) @ (weight.reshape(out, a * b) @ root / scale).mT
    return solution.mT.reshape(out, len(basis), b)


def _lift(basis: Tensor, b: int) -> Tensor:
    """The first stage as a map on whole patches: `P[(r, b'), (a, b)] = V[r, a] δ_{b'b}`."""
    lifted: Tensor = torch.kron(basis, torch.eye(b, dtype=basis.dtype, device=basis.device))
    return lifted

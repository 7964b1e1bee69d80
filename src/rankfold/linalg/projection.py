"""Two-stage maps whose first stage reads part of a patch: a nested basis, and the refit of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.spectrum import explained_tail
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import square_root

# Directions that no patch has still need an order: without any damping the columns that a rank adds can depend on
# earlier ones, and QR then fills in arbitrary directions that would count as explained.
LEAST_DAMPING = 1e-12


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
        damping: Relative damping of the whole Gram; at least 1e-12 is used.

    Returns:
        Shape (k + 1,), never growing.
    """
    projected, total = ordered_projection(weight, gram, basis, damping=damping)
    return explained_tail(projected, total, block=weight.shape[2])


def ordered_projection(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """The target in orthonormal coordinates that fill up in the order of the basis: `W A^{1/2} Q`, `A^{1/2}Pᵀ = QR`.

    Args:
        weight: Shape (out, a, b).
        gram: Shape (a, b, a, b).
        basis: Shape (k, a).
        damping: Relative damping of the whole Gram; at least 1e-12 is used.

    Returns:
        Shape (out, k·b), zero columns where patches run out of directions, and `‖W A^{1/2}‖²` on the same scale.
    """
    out, a, b = weight.shape
    root, _ = square_root(gram.reshape(a * b, a * b), damping=max(damping, LEAST_DAMPING))
    target = weight.reshape(out, a * b) @ root
    target = target / power_of_two_scale(target)
    lifted = lift(basis, b) @ root
    norms = torch.linalg.vector_norm(lifted, dim=1, keepdim=True)
    q, _ = torch.linalg.qr((lifted / torch.where(norms > 0, norms, 1.0)).mT)
    projected = target @ q
    missing = len(basis) * b - projected.shape[1]
    return torch.nn.functional.pad(projected, (0, max(missing, 0))), target.square().sum()


def split_refit(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Both stages, the second the best in the patch metric given the first: `L = W A Pᵀ (P A Pᵀ)⁺`.

    The basis has the scale of the inputs' inverse, the refit that of the outputs; inner channels are rescaled by powers
    of two so that both stages have norms alike, and inputs of scale 1e±20 or half-precision layers do not overflow.

    Args:
        weight: Shape (out, a, b).
        gram: Shape (a, b, a, b).
        basis: First stage, shape (r, a).
        damping: Relative damping of the whole Gram, as in `split_errors`.

    Returns:
        Second stage, shape (out, r, b), and first stage, shape (r, a).
    """
    out, a, b = weight.shape
    root, _ = square_root(gram.reshape(a * b, a * b), damping=max(damping, LEAST_DAMPING))
    lifted = lift(basis, b) @ root  # (r·b) × (a·b)
    scale = power_of_two_scale(root)
    solution: Tensor = torch.linalg.pinv(lifted.mT / scale, rtol=1e-10) @ (weight.reshape(out, a * b) @ root / scale).mT
    return balanced(solution.mT.reshape(out, len(basis), b), basis)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale every inner channel by a power of two so that its norms in both stages differ by a factor of 2 at most.

    Args:
        left: Shape (out, r, b).
        right: Shape (r, a).

    Returns:
        `left` and `right` of the same product. A channel that is zero in one stage gets a norm of about 1 in the other.
    """
    before, after = torch.linalg.vector_norm(right, dim=1), torch.linalg.vector_norm(left, dim=(0, 2))
    before_log, after_log = (torch.where(norm > 0, norm, 1.0).log2() for norm in (before, after))
    both = (before > 0) & (after > 0)
    shift = torch.where(both, (after_log - before_log) / 2, after_log - before_log).round()
    return left * torch.exp2(-shift)[:, None], right * torch.exp2(shift)[:, None]


def lift(basis: Tensor, b: int) -> Tensor:
    """The first stage as a map on whole patches: `P[(r, b'), (a, b)] = V[r, a] δ_{b'b}`."""
    lifted: Tensor = torch.kron(basis, torch.eye(b, dtype=basis.dtype, device=basis.device))
    return lifted

"""Two-stage maps whose first stage reads part of a patch: a nested basis, and the refit of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.spectrum import explained_tail, weighted_energy
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import cholesky, damped_gram, square_root, symmetric_eigen

# Directions that no patch has still need a metric: without any damping the columns that a rank adds can depend on
# earlier ones, and what rounding leaves of them would count as explained.
LEAST_DAMPING = 1e-12


def split_basis(weight: Tensor, gram: Tensor, *, damping: float) -> Tensor:
    """Ordered basis for the part of a patch that the first stage reads.

    A patch is seen as a matrix `x[a, b]`: `a` is read by the first stage (all of it, at every `b` alike), `b` is left
    for the second. With the marginal second moment `Ā = mean_b E[x_b x_bᵀ]` of `a`, the basis is the right singular
    vectors of `W Ā^{1/2}`, `W` seen as (out·b) × a, mapped back by `Ā^{-1/2}`.

    Args:
        weight: Weight `W`, shape (out, a, b).
        gram: Second moment `A` of whole patches, shape (a, b, a, b).
        damping: Relative damping of `Ā`.

    Returns:
        Shape (k, a), `k = min(a, out·b)`, most important direction first.
    """
    out, a, b = weight.shape
    marginal = torch.diagonal(gram, dim1=1, dim2=3).mean(-1)
    root, inverse_root = square_root(marginal, damping=damping)
    seen = weight.permute(0, 2, 1).reshape(out * b, a)
    seen = seen / power_of_two_scale(seen)
    if a > out * b:
        _, _, vh = svd(seen @ root)
        return vh @ inverse_root
    root = root / power_of_two_scale(root)
    _, vectors = symmetric_eigen(root @ (seen.mT @ seen) @ root)
    return vectors.flip(-1).mT @ inverse_root


def split_errors(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> Tensor:
    """Relative squared output error at every rank when the second stage is refitted by least squares.

    With `P` the first stage as a map on whole patches, the refit at rank r explains `tr(C_r G_r⁻¹ C_rᵀ)` of
    `tr(W A Wᵀ)`, `G = P A Pᵀ` and `C = W A Pᵀ` cut to their first r·b rows and columns. One Cholesky factor `G = LLᵀ`
    holds those of all leading blocks, so `Z = L⁻¹Cᵀ` gives all ranks at once: `e_r = 1 − ‖Z_{1..r·b}‖² / tr(W A Wᵀ)`.

    Args:
        weight: Weight `W`, shape (out, a, b).
        gram: Second moment `A` of whole patches, shape (a, b, a, b).
        basis: Basis vectors, shape (k, a), from `split_basis`.
        damping: Relative damping of the whole Gram; at least 1e-12 is used.

    Returns:
        Shape (k + 1,), never growing.
    """
    explained, total = ordered_projection(weight, gram, basis, damping=damping)
    return explained_tail(explained, total, block=weight.shape[2])


def ordered_projection(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """The target in orthonormal coordinates of the projected patches that fill up in the order of the basis.

    `Zᵀ = (L⁻¹Cᵀ)ᵀ` of `split_errors`: what its first r·b columns hold is what the refit at rank r explains.

    Args:
        weight: Weight `W`, shape (out, a, b).
        gram: Second moment `A` of whole patches, shape (a, b, a, b).
        basis: Basis vectors, shape (k, a), from `split_basis`.
        damping: Relative damping of the whole Gram; at least 1e-12 is used.

    Returns:
        Shape (out, k·b), and `tr(W A Wᵀ)` on the same scale.
    """
    metric = damped_gram(gram.reshape(basis.shape[1] * weight.shape[2], -1), damping=max(damping, LEAST_DAMPING))
    inner, outer, _ = _projected(weight, metric, basis)
    explained = torch.linalg.solve_triangular(cholesky(inner), outer.mT, upper=False)
    flat = weight.flatten(1) / power_of_two_scale(weight)
    return explained.mT, weighted_energy(flat, metric / power_of_two_scale(metric))


def split_refit(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Both stages, the second the best in the patch metric given the first: `L = W A Pᵀ (P A Pᵀ)⁺`.

    The basis has the scale of the inputs' inverse, the refit that of the outputs; inner channels are rescaled by powers
    of two so that both stages have norms alike, and inputs of scale 1e±20 or half-precision layers do not overflow.

    Args:
        weight: Weight `W`, shape (out, a, b).
        gram: Second moment `A` of whole patches, shape (a, b, a, b).
        basis: First stage, shape (r, a).
        damping: Relative damping of the whole Gram, as in `split_errors`.

    Returns:
        Second stage, shape (out, r, b), and first stage, shape (r, a).
    """
    return split_fit(weight, gram, basis, damping=damping)[1:]


def split_fit(weight: Tensor, gram: Tensor, basis: Tensor, *, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The target in the coordinates of `ordered_projection`, and both stages of `split_refit`, from one factorisation.

    Args:
        weight: Weight `W`, shape (out, a, b).
        gram: Second moment `A` of whole patches, shape (a, b, a, b).
        basis: First stage, shape (r, a).
        damping: Relative damping of the whole Gram, as in `split_errors`.

    Returns:
        Shapes (out, r·b), (out, r, b) and (r, a).
    """
    out, _, b = weight.shape
    metric = damped_gram(gram.reshape(basis.shape[1] * b, -1), damping=max(damping, LEAST_DAMPING))
    inner, outer, lengths = _projected(weight, metric, basis)
    root = cholesky(inner)
    explained = torch.linalg.solve_triangular(root, outer.mT, upper=False)
    solution = torch.linalg.solve_triangular(root.mT, explained, upper=True).mT.reshape(out, len(basis), b)
    return explained.mT, *balanced(solution * power_of_two_scale(weight), basis / lengths)


def _projected(weight: Tensor, metric: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`G = P A Pᵀ`, `C = W A Pᵀ` and the lengths `sqrt(v Ā vᵀ)` of the basis vectors, which are divided out of both.

    With `P[(r, b'), (a, b)] = V[r, a] δ_{b'b}`. `W` and `A` are taken without their powers of two.

    Args:
        weight: Weight `W`, shape (out, a, b).
        metric: Damped second moment `A`, shape (a·b, a·b).
        basis: Basis vectors `V`, shape (k, a).

    Returns:
        `G` (k·b, k·b) with ones on the mean diagonal of each block, `C` (out, k·b), and the lengths (k, 1) in the
        metric without its power of two.
    """
    out, a, b = weight.shape
    k = len(basis)
    scaled = metric / power_of_two_scale(metric)
    norms = torch.linalg.vector_norm(basis, dim=1, keepdim=True)
    unit = basis / torch.where(norms > 0, norms, 1.0)
    half = (unit @ scaled.reshape(a, b * a * b)).reshape(k, b, a, b)
    inner = (half.movedim(2, 3) @ unit.mT).movedim(3, 2).reshape(k * b, k * b)
    outer = (weight / power_of_two_scale(weight)).reshape(out, a * b) @ half.reshape(k * b, a * b).mT
    seen = torch.diagonal(inner).reshape(k, b).mean(1).clamp_min(0).sqrt()  # rounding can make a variance negative
    seen = torch.where(seen > 0, seen, 1.0)
    inverse = (1 / seen).repeat_interleave(b)
    return inner * inverse[:, None] * inverse, outer * inverse, (seen * norms[:, 0])[:, None]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale every inner channel by a power of two so that its norms in both stages differ by a factor of 2 at most.

    Args:
        left: Second stage, shape (out, r, b).
        right: First stage, shape (r, a).

    Returns:
        `left` and `right` of the same product. A channel that is zero in one stage gets a norm of about 1 in the other.
    """
    before, after = torch.linalg.vector_norm(right, dim=1), torch.linalg.vector_norm(left, dim=(0, 2))
    before_log, after_log = (torch.where(norm > 0, norm, 1.0).log2() for norm in (before, after))
    both = (before > 0) & (after > 0)
    shift = torch.where(both, (after_log - before_log) / 2, after_log - before_log).round()
    return left * torch.exp2(-shift)[:, None], right * torch.exp2(shift)[:, None]

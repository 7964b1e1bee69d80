"""Square roots and pseudo-inverses of Gram matrices; a rank-deficient Gram is the normal case."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.linalg.precision import power_of_two_scale, widen


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0, ascending) and eigenvectors of a positive semidefinite matrix.

    Args:
        gram: Shape (n, n); its symmetric part is used, so rounding that breaks symmetry does no harm.

    Returns:
        `values` (n,) and `vectors` (n, n), columns matching.
    """
    work = widen(gram)
    scale = power_of_two_scale(work)
    work = work / scale
    values, vectors = torch.linalg.eigh((work + work.mT) / 2)
    return values.clamp_min(0) * scale, vectors


def damped(values: Tensor, damping: float) -> Tensor:
    """Eigenvalues plus `damping` times their mean; ones where all are zero (a site that saw only zeros)."""
    mean = values.mean()
    return torch.where(mean > 0, values + damping * mean, torch.ones_like(values))


def square_root(gram: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a damped Gram and its inverse.

    `A + λI = QΛQᵀ` with `λ = damping · tr(A)/n`; returns `QΛ^{1/2}Qᵀ` and `QΛ^{-1/2}Qᵀ`.

    Args:
        gram: `A`, shape (n, n), positive semidefinite of any rank.
        damping: Relative; 0 gives the pseudo-inverse on the range of `A`.

    Returns:
        `root` and `inverse_root`, each (n, n) in the work dtype. A zero Gram gives two identities.
    """
    values, vectors = symmetric_eigen(gram)
    roots = damped(values, damping).sqrt()
    usable = roots > roots.max() * len(roots) ** 0.5 * torch.finfo(roots.dtype).eps ** 0.5
    inverse = torch.where(usable, 1 / roots, 0.0)
    return (vectors * roots) @ vectors.mT, (vectors * inverse) @ vectors.mT


def pseudo_inverse(gram: Tensor, *, damping: float = 0.0) -> Tensor:
    """Inverse of a damped positive semidefinite matrix, on its range.

    Args:
        gram: Shape (n, n).
        damping: Relative to the mean eigenvalue.

    Returns:
        Shape (n, n); a zero matrix gives the identity, as `square_root` does.
    """
    _, inverse_root = square_root(gram, damping=damping)
    return inverse_root @ inverse_root


def shrinkage(gram: Tensor, count: int) -> float:
    """How far a sample Gram should be shrunk towards a multiple of the identity: 0 (not at all) to 1.

    `ρ = min(1, ((1 − 2/p) tr(A²) + tr²(A)) / ((n + 1 − 2/p)(tr(A²) − tr²(A)/p)))`, p features, n samples. It vanishes
    as n grows past p; with fewer samples than features it keeps directions that no sample took from looking free.

    Args:
        gram: Mean second moment `A` over the samples, shape (p, p).
        count: n.

    References:
        Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Processing 58, 2010, equation 23 (oracle approximating
        shrinkage). We differ in using it on raw second moments too.
    """
    work = widen(gram)
    p = len(work)
    trace = float(work.trace())
    if p < 2 or count < 1 or not trace > 0:
        return 0.0
    work = work / trace
    squares = float(work.square().sum())
    spread = squares - 1 / p
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / p) * squares + 1) / ((count + 1 - 2 / p) * spread))


def shrunk(gram: Tensor, mean: Tensor | None, count: int) -> Tensor:
    """A second moment whose covariance is shrunk: `(1 − ρ) Σ + ρ tr(Σ)/p · I + x̄x̄ᵀ`, `ρ` from `shrinkage`.

    Args:
        gram: Mean second moment, shape (p, p).
        mean: `x̄`, shape (p,); None shrinks the second moment itself.
        count: Samples behind it.
    """
    centre = torch.zeros_like(gram) if mean is None else torch.outer(mean, mean)
    covariance = gram - centre
    rho = shrinkage(covariance, count)
    level = rho * covariance.diagonal().mean()
    return (1 - rho) * covariance + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + centre

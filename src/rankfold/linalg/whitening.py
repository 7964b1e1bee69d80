"""Square roots and pseudo-inverses of Gram matrices; a rank-deficient Gram is the normal case."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.errors import NumericsError
from rankfold.linalg.precision import power_of_two_scale, widen


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0, ascending) and eigenvectors of a positive semidefinite matrix.

    Args:
        gram: Matrix, shape (n, n); its symmetric part is used, so rounding that breaks symmetry does no harm.

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
        gram: Gram `A`, shape (n, n), positive semidefinite of any rank.
        damping: Damping relative to the mean eigenvalue; 0 gives the pseudo-inverse on the range of `A`.

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
        gram: Matrix, shape (n, n).
        damping: Damping relative to the mean eigenvalue.

    Returns:
        Shape (n, n); a zero matrix gives the identity, as `square_root` does.
    """
    _, inverse_root = square_root(gram, damping=damping)
    return inverse_root @ inverse_root


def shrinkage(gram: Tensor, count: int) -> float:
    """Shrinkage intensity of a sample Gram towards a multiple of the identity: 0 (none) to 1.

    `ρ = min(1, ((1 − 2/p) tr(A²) + tr²(A)) / ((n + 1 − 2/p)(tr(A²) − tr²(A)/p)))`, p features, n samples. It vanishes
    as n grows past p; with fewer samples than features it keeps directions that no sample has from looking free
    of error. `shrinkage_of` is the better estimate where samples can be halved.

    Args:
        gram: Mean second moment `A` over the samples, shape (p, p).
        count: Number of samples n.

    References:
        Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Processing 58, 2010, equation 23 (oracle approximating
        shrinkage). We differ in using it on raw second moments and correlations too.
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


def shrinkage_of(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Shrinkage intensity of covariances towards their diagonal, from those of two halves of the samples.

    With the correlations `R₁`, `R₂` of the halves beyond their diagonals (in the scales of both together), `⟨R₁, R₂⟩`
    estimates the energy of the true ones, since the noise of one half is independent of the other; `‖R₁‖²` and `‖R₂‖²`
    have the energy `N` of noise on top. `(1 − ρ) R` is closest to the true correlations at `ρ = N / (⟨R₁, R₂⟩ + N)`;
    with all samples `N` is half as large. Nothing is assumed of how samples are drawn, nor that positions of one sample
    are independent, as in a formula that counts them.

    Args:
        first: Covariance (or second moment) of one half, shape (p, p).
        second: Covariance (or second moment) of the other half, shape (p, p).

    Returns:
        `ρ` for one half, and for both together, each in [0, 1]; 0 where there is nothing beyond the diagonals.
    """
    both = torch.stack([widen(first), widen(second)])
    scales = inverse_scales(both.mean(0))
    both = both * scales[:, None] * scales
    both.diagonal(dim1=1, dim2=2).zero_()
    shared = float((both[0] * both[1]).sum().clamp_min(0))
    return _of_halves(shared, float(both.square().sum()) / 2)


def scales_shrinkage(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Shrinkage intensity of the scales of inputs towards each other, from two halves of the samples.

    Same as `shrinkage_of`, with the logarithms of the diagonals less their means in the place of the correlations: a
    scale of few samples is off by a factor, be it large or small.

    Args:
        first: Covariance (or second moment) of one half, shape (p, p).
        second: Covariance (or second moment) of the other half, shape (p, p).

    Returns:
        `ρ` for one half, and for both together, each in [0, 1].
    """
    both = torch.stack([widen(first).diagonal(), widen(second).diagonal()])
    both = both[:, (both > 0).all(0)].log()
    if both.shape[1] < 2:
        return 0.0, 0.0
    both = both - both.mean(1, keepdim=True)
    shared = float((both[0] * both[1]).sum().clamp_min(0))
    return _of_halves(shared, float(both.square().sum()) / 2)


def _of_halves(shared: float, energy: float) -> tuple[float, float]:
    """`N/(S + N)` and `N/(2S + N)`, `N` the energy of a half beyond the `S` that both share."""
    chance = max(energy - shared, 0.0)
    if not chance > 0:
        return 0.0, 0.0
    return chance / (shared + chance), chance / (2 * shared + chance)


def with_even_scales(gram: Tensor, rho: float) -> Tensor:
    """`diag(t) A diag(t)` with `log(t²A_ii) = (1 − ρ) log A_ii + ρ mean log A + c`; `c` keeps the trace.

    Args:
        gram: Second moment `A`, shape (p, p).
        rho: Shrinkage `ρ`, in [0, 1].
    """
    level = gram.diagonal()
    usable = level > 0
    if rho <= 0 or not bool(usable.any()):
        return gram
    logs = torch.where(usable, level.clamp_min(torch.finfo(level.dtype).tiny).log(), 0.0)
    factor = torch.where(usable, (rho * (logs.sum() / usable.sum() - logs)).exp(), 1.0)
    factor = (factor * (level.sum() / (level * factor).sum())).sqrt()
    return gram * factor[:, None] * factor


def inverse_scales(gram: Tensor) -> Tensor:
    """`1/√A_ii`, shape (p,); 0 for a feature that is always 0 (up to rounding beside the others)."""
    level = gram.diagonal().clamp_min(0)
    usable = level > level.amax() * torch.finfo(level.dtype).tiny ** 0.5
    return torch.where(usable, level.rsqrt(), 0.0)


def shrunk(gram: Tensor, mean: Tensor | None, rho: float) -> Tensor:
    """A second moment whose covariance is shrunk towards its diagonal: `(1 − ρ) Σ + ρ diag(Σ) + x̄x̄ᵀ`.

    Every input keeps its own scale: a multiple of the identity would give inputs that hardly vary a share of the
    largest one's variance, and in a transformer they differ by orders of magnitude.

    Args:
        gram: Mean second moment, shape (p, p).
        mean: Mean input `x̄`, shape (p,); None shrinks the second moment itself.
        rho: Shrinkage `ρ`, in [0, 1].
    """
    own = covariance(gram, mean)
    result = add_diagonal_((1 - rho) * own, rho * own.diagonal())
    return result if mean is None else result + torch.outer(mean, mean)


def covariance(gram: Tensor, mean: Tensor | None) -> Tensor:
    """`A − x̄x̄ᵀ`; `A` itself where there is no mean."""
    return gram if mean is None else gram - torch.outer(mean, mean)


def correlations(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`D^{-1/2} A D^{-1/2}`, `D = diag(A)`, shape (p, p), and the inverse scales `D^{-1/2}`, shape (p,)."""
    scales = inverse_scales(gram)
    return gram * scales[:, None] * scales, scales


def damped_gram(gram: Tensor, *, damping: float) -> Tensor:
    """`A + λI`, symmetric, with `λ` as in `square_root`; the identity for a zero Gram.

    Args:
        gram: Gram `A`, shape (n, n).
        damping: Damping relative to the mean eigenvalue.
    """
    work = widen(gram)
    mean = torch.diagonal(work).mean()
    if not float(mean) > 0:
        return torch.eye(len(work), dtype=work.dtype, device=work.device)
    return add_diagonal_((work + work.mT) / 2, damping * mean)


def add_diagonal_(matrix: Tensor, level: Tensor) -> Tensor:
    """`M + λI`, or `M + diag(λ)` for one level per row, in place; returns `M`."""
    matrix.diagonal().add_(level)
    return matrix


def left_spectrum(weight: Tensor, gram: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of `W (A + λI)^{1/2}`, by eigenvectors of the smaller side alone.

    Where `W` is flat, `W (A + λI) Wᵀ = U Σ² Uᵀ`, so no root of `A` is needed: for a 3×3 convolution of 512 channels an
    eigenproblem of 512 instead of 4608. Where it is tall, `MᵀM = V Σ² Vᵀ` with `M = W (A + λI)^{1/2}`, and `U` is `M V`
    made orthonormal. Singular values below `√eps · s₁` have no digits left; their energy, below `eps · s₁²`, has none
    either way.

    Args:
        weight: Weight `W`, shape (out, n).
        gram: Gram `A`, shape (n, n), positive semidefinite of any rank.
        damping: Relative damping, as in `square_root`.

    Returns:
        `u` (out, k) with orthonormal columns and `s` (k,), descending, `k = min(out, n)`.
    """
    work = widen(weight)
    scale, gram_scale = power_of_two_scale(work), power_of_two_scale(gram)
    work, gram = work / scale, gram / gram_scale
    if work.shape[0] <= work.shape[1]:
        values, vectors = symmetric_eigen(work @ damped_gram(gram, damping=damping) @ work.mT)
        u = vectors.flip(-1)
    else:
        root, _ = square_root(gram, damping=damping)
        tall = work @ root
        values, vectors = symmetric_eigen(tall.mT @ tall)
        u, _ = torch.linalg.qr(tall @ vectors.flip(-1))
    return u, values.flip(-1).sqrt() * scale * gram_scale.sqrt()


def cholesky(gram: Tensor) -> Tensor:
    """Lower triangular `L` with `LLᵀ = A + εI`, `ε` the least of 0, 1e-15, 1e-14, … of the largest element that works.

    Its leading blocks belong to the leading blocks of `A`, so one factor serves every leading block. What rounding made
    indefinite is damped; a finite matrix never fails, since `ε` of n times the largest element is always enough.

    Args:
        gram: Gram `A`, shape (n, n), positive semidefinite up to rounding.

    Raises:
        NumericsError: An element is NaN or infinite.
    """
    work = widen(gram)
    if not bool(torch.isfinite(work).all()):
        raise NumericsError(
            f"Gram of shape {tuple(gram.shape)}",
            law="every element is finite",
            got=f"{int((~torch.isfinite(work)).sum())} NaN or infinite",
            cure="look at the moments it was made from",
        )
    largest = work.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)
    shift = 0.0
    while True:
        damped_work = work.clone()
        torch.diagonal(damped_work).add_(shift * unit)
        factor, failed = torch.linalg.cholesky_ex(damped_work)
        if not bool(failed) and bool(torch.isfinite(factor).all()):
            result: Tensor = factor
            return result
        shift = shift * 10 if shift else 1e-15


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """`M⁻¹R` of a positive definite `M`: by Cholesky, a third of the work, and by LU where rounding left it indefinite.

    Args:
        matrix: `M`, shape (n, n).
        right: `R`, shape (n, k).
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return torch.cholesky_solve(right, factor)
    solved: Tensor = torch.linalg.solve(matrix, right)
    return solved

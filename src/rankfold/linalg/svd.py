"""Singular value decompositions: exact, through the Gram for very flat matrices, randomised with a checked residual."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from rankfold.errors import NumericsError
from rankfold.linalg.precision import power_of_two_scale, widen

FLAT = 16  # sides further apart than this factor go through the Gram of the short side


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition `M = U diag(s) Vᵀ`, by an exact method that is chosen by shape.

    Args:
        matrix: Matrix `M`, shape (m, n), any floating dtype; widened to the work dtype.

    Returns:
        `u` (m, k), `s` (k,) descending, `vh` (k, n) with `k = min(m, n)`. Zero matrices give zero `s` and orthonormal
        vectors.

    Raises:
        NumericsError: An element is NaN or infinite.

    Cost is `O(m n k)`. For sides further apart than a factor of 16 the short side's Gram is used (`gram_svd`).
    """
    m, n = matrix.shape
    if min(m, n) > 1 and max(m, n) >= FLAT * min(m, n):
        return gram_svd(matrix)
    return exact_svd(matrix)


def exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`svd` by LAPACK's divide and conquer; where that does not converge, by QR iteration (SciPy's gesvd)."""
    work = _finite(matrix)
    scale = power_of_two_scale(work)
    try:
        u, s, vh = torch.linalg.svd(work / scale, full_matrices=False)
    except RuntimeError:  # torch.linalg.LinAlgError, which torch's stubs leave out
        arrays = scipy.linalg.svd((work / scale).cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        u, s, vh = (torch.from_numpy(array).to(work) for array in arrays)
    return u, s * scale, vh


def gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`svd` through the eigenvectors of the short side's Gram, then one exact decomposition of a small matrix.

    With `M` of shape (m, n), m ≤ n: `MMᵀ = QΛQᵀ`, `QᵀM = RᵀP` (QR of its transpose), and `Rᵀ = U' diag(s) V'ᵀ` is
    m × m, so `U = QU'`, `Vᵀ = V'ᵀP`. The Gram only orders the directions; the values come from `M` itself, so singular
    values far below `√eps · s₁` keep their digits, unlike in the textbook form.

    Args:
        matrix: Matrix `M`, shape (m, n), with either side the short one.

    Returns:
        The same as `svd`.
    """
    work = _finite(matrix)
    if work.shape[0] > work.shape[1]:
        u, s, vh = gram_svd(work.mT)
        return vh.mT, s, u.mT
    scale = power_of_two_scale(work)
    work = work / scale
    _, rotation = torch.linalg.eigh(work @ work.mT)
    rotated = rotation.flip(-1).mT @ work
    basis, triangle = torch.linalg.qr(rotated.mT)
    inner_u, s, inner_vh = exact_svd(triangle.mT)
    return rotation.flip(-1) @ inner_u, s * scale, inner_vh @ basis.mT


def randomized_svd(
    matrix: Tensor, rank: int, *, seed: int = 0, oversample: int = 10, tolerance: float = 1e-6, sweeps: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration from a random start, with a checked residual.

    The triplets are returned only if `max_i ‖M v_i − s_i u_i‖ ≤ tolerance · s_1` for the leading `rank` (the other
    half, `Mᵀu_i = s_i v_i`, holds by construction); otherwise the exact decomposition is computed and cut.

    Args:
        matrix: Matrix `M`, shape (m, n).
        rank: Number of triplets, 1 to min(m, n).
        seed: Seed of the start; the global generator is not touched.
        oversample: Number of extra columns carried along.
        tolerance: Largest relative residual that is accepted.
        sweeps: Largest number of iterations, of two products with `M` each.

    Returns:
        `u` (m, rank), `s` (rank,), `vh` (rank, n).

    References:
        Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53, 2011, algorithms 4.4 and 5.1.
        We differ in iterating until the residual is small instead of a fixed number of times, and in falling back.
    """
    work = _finite(matrix)
    width = rank + oversample
    if width < min(work.shape) // 2:
        scale = power_of_two_scale(work)
        work = work / scale
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(work.shape[0], width, generator=generator, dtype=torch.float64).to(work)
        left, _ = torch.linalg.qr(work @ (work.mT @ start))
        for _ in range(sweeps):
            inner_u, s, vh = torch.linalg.svd(left.mT @ work, full_matrices=False)
            u = left @ inner_u
            # M v_i − s_i u_i is what the subspace misses of M.
            missed = torch.linalg.vector_norm(work @ vh[:rank].mT - u[:, :rank] * s[:rank], dim=0)
            if bool((missed <= tolerance * s[0]).all()):
                return u[:, :rank], s[:rank] * scale, vh[:rank]
            left, _ = torch.linalg.qr(work @ vh.mT)
        work = work * scale
    u, s, vh = svd(work)
    return u[:, :rank], s[:rank], vh[:rank]


def _finite(matrix: Tensor) -> Tensor:
    """The matrix in the work dtype, after checking that every element is finite."""
    work = widen(matrix)
    if not bool(torch.isfinite(work).all()):
        raise NumericsError(
            f"matrix of shape {tuple(matrix.shape)}",
            law="every element is finite",
            got=f"{int((~torch.isfinite(work)).sum())} NaN or infinite",
            cure="look at the weight and the moments it was made from",
        )
    return work

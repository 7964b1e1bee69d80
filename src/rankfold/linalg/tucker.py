"""Tucker: a core with a matrix on each mode, or, as Tucker-2, on the input and the output mode alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.linalg.modes import basis, times
from rankfold.linalg.precision import power_of_two_scale
from rankfold.linalg.projection import LEAST_DAMPING, ordered_projection, split_basis, split_fit
from rankfold.linalg.spectrum import weighted_energy
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import damped_gram, symmetric_eigen


def hooi(
    weight: Tensor, ranks: tuple[int, int], *, sweeps: int = 10, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 of a weight in the Frobenius norm: HOSVD start, then higher-order orthogonal iteration.

    `W[o, i, k] ≈ Σ U[o, b] core[b, a, k] V[a, i]` with orthonormal `U`, `V`. A sweep takes `V` from the SVD of the
    weight projected on `U`, then `U` from the SVD of the weight projected on `V`; the error never grows.

    Args:
        weight: Weight `W`, shape (out, in, taps).
        ranks: Ranks `(a, b)`: inner input and output widths.
        sweeps: Largest number of sweeps.
        tolerance: Fraction of the captured energy; sweeps stop when it grows by less.

    Returns:
        `U` (out, b), core (b, a, taps), `V` (a, in).

    References:
        De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000, algorithm 4.2, on two of the modes.
    """
    inner, outer = ranks
    scale = power_of_two_scale(weight)
    work = weight / scale
    out = _leading(work.flatten(1), outer)
    inp = _leading(work.movedim(1, 0).flatten(1), inner).mT
    captured = work.new_zeros(())
    for _ in range(sweeps):
        inp = _leading(torch.einsum("ob,oik->ibk", out, work).flatten(1), inner).mT
        narrow = torch.einsum("ai,oik->oak", inp, work)
        out = _leading(narrow.flatten(1), outer)
        energy = torch.einsum("ob,oak->bak", out, narrow).square().sum()
        if float(energy - captured) <= tolerance * float(energy):
            break
        captured = energy
    core = torch.einsum("ob,oak->bak", out, torch.einsum("ai,oik->oak", inp, work))
    return out, core * scale, inp


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors of a matrix: of a wide one eigenvectors of its Gram.

    A subspace needs no more than half of the digits; what it leaves of the tensor is computed from the tensor.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return svd(matrix)[0][:, :count]
    return symmetric_eigen(matrix @ matrix.mT)[1].flip(-1)[:, :count]


def metric_tucker(
    weight: Tensor, gram: Tensor, ranks: tuple[int, int], *, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 in the metric of the patches, in closed form given the input factor.

    The input factor is the basis of `split_basis`. What remains, `min ‖(W − L P) A^{1/2}‖` over rank-b maps `L` of the
    projected patches, is solved by the singular vectors of the projected target.

    Args:
        weight: Weight `W`, shape (out, in, taps).
        gram: Second moment `A` of the patches, shape (in, taps, in, taps).
        ranks: Ranks `(a, b)`, as in `hooi`.
        damping: Relative damping of the Grams.

    Returns:
        `U` (out, b), core (b, a, taps), `V` (a, in).
    """
    inner, outer = ranks
    return _behind(weight, gram, split_basis(weight, gram, damping=damping)[:inner], outer, damping=damping)


def _behind(weight: Tensor, gram: Tensor, inp: Tensor, outer: int, *, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best output factor and core behind an input factor (a, in), which is rescaled by powers of two."""
    projected, left, right = split_fit(weight, gram, inp, damping=damping)  # left: out × a × taps, right: a × in
    out = svd(projected)[0][:, :outer]
    return out, torch.einsum("ob,oak->bak", out, left), right


def refined_tucker(
    weight: Tensor, gram: Tensor, parts: tuple[Tensor, Tensor, Tensor], *, damping: float, passes: int, steps: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares from a Tucker-2 in the metric of the patches; the error never grows.

    A pass takes a few steps of conjugate gradients towards the best input factor behind the output factor and the core,
    `Σ_{k,l} C_kᵀ C_l V A_{lk} = Σ_k C_kᵀ Uᵀ (W A)_k`, and then the best output factor and core in closed form. It is
    kept where it lowers the error.

    Args:
        weight: Weight `W`, shape (out, in, taps).
        gram: Second moment `A` of the patches, shape (in, taps, in, taps).
        parts: `U` (out, b) with orthonormal columns, core `C` (b, a, taps), `V` (a, in), as of `metric_tucker`.
        damping: Relative damping of the Gram.
        passes: Largest number of passes.
        steps: Steps of conjugate gradients in a pass.

    Returns:
        The three parts.
    """
    _, inputs, taps = weight.shape
    scale = power_of_two_scale(weight)
    flat = damped_gram(gram.reshape(inputs * taps, -1), damping=max(damping, LEAST_DAMPING))
    flat = flat / power_of_two_scale(flat)
    target = (weight / scale).flatten(1)

    def lost(found: tuple[Tensor, Tensor, Tensor]) -> float:
        made = torch.einsum("ob,bak,ai->oik", found[0], found[1] / scale, found[2]).flatten(1)
        return float(weighted_energy(target - made, flat))

    least = lost(parts)
    for _ in range(passes if least > 1e-12 * float(weighted_energy(target, flat)) else 0):
        left, core, inp = parts
        factor = _conjugate_gradients(left.mT @ target, core / scale, inp, flat, steps)
        tried = _behind(weight, gram, factor, core.shape[0], damping=damping)
        error = lost(tried)
        if not error < least:
            break
        parts, least = tried, error
    return parts


def _conjugate_gradients(target: Tensor, core: Tensor, inp: Tensor, metric: Tensor, steps: int) -> Tensor:
    """Steps towards the input factor `V` that makes `‖(T − C (V ⊗ I)) A^{1/2}‖` smallest, from one that is given.

    Args:
        target: `T`, shape (b, in·taps).
        core: `C`, shape (b, a, taps).
        inp: The start, shape (a, in).
        metric: `A`, shape (in·taps, in·taps).
        steps: Number of steps.
    """
    inputs, taps = inp.shape[1], core.shape[2]

    def gradient(maps: Tensor) -> Tensor:
        seen = torch.unflatten(maps @ metric, 1, (inputs, taps))
        return torch.einsum("bak,bik->ai", core, seen)

    def normal(factor: Tensor) -> Tensor:
        return gradient(torch.einsum("bak,ai->bik", core, factor).flatten(1))

    rest = gradient(target) - normal(inp)
    direction, energy = rest, rest.square().sum()
    for _ in range(steps):
        image = normal(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:
            break
        step = energy / curvature
        inp, rest = inp + step * direction, rest - step * image
        before, energy = energy, rest.square().sum()
        direction = rest + energy / before * direction
    return inp


def metric_tucker_errors(weight: Tensor, gram: Tensor, inner: list[int], *, damping: float) -> Tensor:
    """Relative squared output errors of `metric_tucker` for every output rank at some input ranks.

    Args:
        weight: Weight `W`, shape (out, in, taps).
        gram: Second moment `A` of the patches, shape (in, taps, in, taps).
        inner: Input ranks.
        damping: Relative damping of the Grams.

    Returns:
        Shape (len(inner), out): entry (i, b − 1) is the error at `(inner[i], b)`.
    """
    out, _, taps = weight.shape
    basis = split_basis(weight, gram, damping=damping)
    projected, total = ordered_projection(weight, gram, basis, damping=damping)
    if float(total) <= 0:
        return weight.new_zeros(len(inner), out)
    rows = []
    for a in inner:
        part = projected[:, : a * taps]
        values = torch.linalg.eigvalsh(part @ part.mT).flip(0).clamp_min(0)
        rows.append((1 - values.cumsum(0) / total).clamp(0, 1))
    return torch.stack(rows)


def tucker(
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    start: Sequence[Tensor] | None = None,
    sweeps: int = 50,
    tolerance: float = 1e-8,
) -> tuple[Tensor, list[Tensor]]:
    """Tucker decomposition along every mode, in the Frobenius norm: HOSVD start, then orthogonal iteration.

    `T ≈ C ×_1 U_1 … ×_d U_d` with orthonormal `U_m`. In a sweep each `U_m` is taken from the tensor projected on all
    others, so the error never grows.

    Args:
        tensor: Tensor, shape (n_1, …, n_d).
        ranks: Ranks r_1 to r_d.
        start: Bases of all modes, of which the first columns are the start, from `hosvd`; None computes them.
        sweeps: Largest number of sweeps.
        tolerance: Fraction of the captured energy; sweeps stop when it grows by less.

    Returns:
        Core (r_1, …, r_d), and `U_m` (n_m, r_m).

    References:
        De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000, algorithm 4.2.
    """
    scale = power_of_two_scale(tensor)
    work = tensor / scale
    modes = range(work.ndim)
    found = [vectors[:, :rank] for vectors, rank in zip(hosvd(work) if start is None else start, ranks, strict=True)]
    captured = work.new_zeros(())
    for _ in range(sweeps):
        for mode in modes:
            found[mode] = basis(_projected(work, found, besides=mode), mode)[:, : ranks[mode]]
        energy = _projected(work, found).square().sum()
        if float(energy - captured) <= tolerance * float(energy):
            break
        captured = energy
    return _projected(work, found) * scale, found


def hosvd(tensor: Tensor) -> list[Tensor]:
    """Left singular vectors of the unfoldings along all modes, most important first, (n_m, min(n_m, rest))."""
    return [basis(tensor, mode) for mode in range(tensor.ndim)]


def _projected(work: Tensor, found: Sequence[Tensor], *, besides: int | None = None) -> Tensor:
    """The tensor in the coordinates of the bases of all modes, or all but one."""
    for mode, vectors in enumerate(found):
        if mode != besides:
            work = times(work, vectors.mT, mode)
    return work

"""Interpolative decomposition: a few columns that the others are combinations of, and the combinations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rankfold.errors import DataError, OptionError
from rankfold.linalg.precision import power_of_two_scale, widen
from rankfold.linalg.whitening import cholesky, damped_gram

LARGEST_ENTRY = 2.0  # bound on |T| in `strong_rrqr`
LEAST_DAMPING = 1e-12


def pivoted_qr(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Column pivots of stacked rows, block after block: `ZΠ = QR`, `Z` never in memory as a whole.

    Each block is reduced together with the triangle of those before it (TSQR): the triangle of all rows has the inner
    products of the columns, so its pivots are those of `Z`.

    Args:
        blocks: Blocks of rows of `Z`, each (rows, C).

    Returns:
        Pivots, shape (C,), most independent column first, and `|R_ii|`, shape (min(rows, C),), never growing.

    Raises:
        DataError: No block.

    References:
        Businger and Golub, Numerische Mathematik 7, 1965 (column pivoting), by SciPy; Demmel et al., SIAM J. Sci.
        Comput. 34, 2012 (TSQR). We differ in reducing block after block, not in a tree.
    """
    triangle: Tensor | None = None
    for block in blocks:
        rows = widen(block)
        stacked = rows if triangle is None else torch.cat([triangle, rows])
        triangle = torch.linalg.qr(stacked, mode="r")[1] if len(stacked) > stacked.shape[1] else stacked
    if triangle is None:
        raise DataError("blocks", law="at least one block of rows", got="none", cure="pass activations")
    r, pivots = scipy.linalg.qr(triangle.cpu().numpy(), mode="r", pivoting=True)
    diagonal = np.abs(np.diagonal(r))
    return torch.from_numpy(pivots.astype(np.int64)), torch.from_numpy(diagonal.copy())


def pivoted_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots of a Gram `A = ZᵀZ`: those of `pivoted_qr` on `Z`, by largest remaining diagonal.

    Args:
        gram: Gram `A`, shape (C, C), positive semidefinite.

    Returns:
        Pivots, shape (C,), and `|R_ii|`, shape (C,), never growing. A Gram determines a column's remainder only down
        to `√eps` of its length; below that the rest keeps its order with a remainder of 0.

    References:
        Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 10.3.
    """
    work = widen(gram)
    scale = power_of_two_scale(work)
    work = work / scale
    count = len(work)
    rest = torch.diagonal(work).clamp_min(0).clone()
    floor = float(rest.max()) * count * torch.finfo(work.dtype).eps if count else 0.0
    factor = work.new_zeros(count, count)  # row i: the i-th row of R, in the columns' own order
    left = torch.ones(count, dtype=torch.bool, device=work.device)
    pivots: list[int] = []
    lengths = work.new_zeros(count)
    for step in range(count):
        eligible = torch.where(left, rest, -1.0)
        best = int(eligible.argmax())
        if float(rest[best]) <= floor:
            pivots += torch.nonzero(left).flatten().tolist()
            break
        length = rest[best].sqrt()
        row = (work[best] - factor[:step, best] @ factor[:step]) / length
        factor[step] = torch.where(left, row, 0.0)
        factor[step, best] = length
        lengths[step] = length
        left[best] = False
        pivots.append(best)
        rest = torch.where(left, (rest - factor[step].square()).clamp_min(0), 0.0)
    return torch.tensor(pivots, dtype=torch.int64), lengths * scale.sqrt()


def interpolation(gram: Tensor, kept: Sequence[int] | Tensor, *, damping: float = LEAST_DAMPING) -> Tensor:
    """Coefficients that predict all columns from some: `T = argmin ‖Z − Z_J T‖`, from the Gram alone: `T = A_JJ⁺ A_J`.

    Args:
        gram: Gram `A = ZᵀZ` (or a mean of it), shape (C, C).
        kept: Indices `J` of the kept columns, k distinct ones.
        damping: Relative damping of `A_JJ`.

    Returns:
        Shape (k, C), with the identity in the columns of `J`.
    """
    work, chosen, inner = _kept_first(gram, kept, damping)
    result = torch.cholesky_solve(work[chosen], inner)
    result[:, chosen] = torch.eye(len(chosen), dtype=work.dtype, device=work.device)
    return result


def folded(weight: Tensor, gram: Tensor, kept: Sequence[int] | Tensor, *, damping: float = LEAST_DAMPING) -> Tensor:
    """The weight on some columns that best replaces the weight on all: `W Tᵀ = W_J + W_R A_RJ A_JJ⁺`.

    `T` is that of `interpolation`, and is not formed: it has a column for each of C, `W` a row for each output.

    Args:
        weight: Weight `W`, shape (out, C).
        gram: Gram `A`, shape (C, C).
        kept: Indices `J` of the kept columns, k distinct ones; `R` are the others.
        damping: Relative damping of `A_JJ`.

    Returns:
        Shape (out, k), in the order of `kept`.
    """
    work, chosen, inner = _kept_first(gram, kept, damping)
    removed = torch.ones(len(work), dtype=torch.bool, device=work.device)
    removed[chosen] = False
    wide = widen(weight)
    return wide[:, chosen] + torch.cholesky_solve((wide[:, removed] @ work[removed][:, chosen]).mT, inner).mT


def _kept_first(gram: Tensor, kept: Sequence[int] | Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram at a safe scale, the kept indices on its device, and the Cholesky factor of the damped `A_JJ`."""
    work = widen(gram)
    chosen = torch.as_tensor(kept, dtype=torch.int64, device=work.device)
    work = work / power_of_two_scale(work)
    return work, chosen, cholesky(damped_gram(work[chosen][:, chosen], damping=max(damping, LEAST_DAMPING)))


def strong_rrqr(
    gram: Tensor, kept: Sequence[int] | Tensor, *, largest: float = LARGEST_ENTRY, sweeps: int | None = None
) -> Tensor:
    """Exchange kept columns for others until no coefficient of the interpolation is above a bound.

    Exchanging kept i for another j multiplies the volume of the kept columns by `ρ_ij`,
    `ρ_ij² = T_ij² + S_jj (A_JJ⁻¹)_ii`, `S` the Schur complement of the rest. While some `ρ_ij > f` the largest is
    carried out; then `|T_ij| ≤ f` and `‖Z − Z_J T‖ ≤ √(1 + f² k (C − k)) σ_{k+1}`.

    Args:
        gram: Gram `A = ZᵀZ`, shape (C, C).
        kept: Indices `J` of the columns kept at the start, such as the first pivots.
        largest: Bound `f` on the coefficients, at least 1.
        sweeps: Largest number of exchanges; None is 4 times the number of columns. Each multiplies the volume by more
            than f, so they end by themselves for f > 1.

    Returns:
        The kept indices, shape (k,), sorted.

    References:
        Gu and Eisenstat, SIAM J. Sci. Comput. 17, 1996, algorithm 4. We differ in reading the Gram, not `R`.
    """
    if not largest >= 1:
        raise OptionError("largest", law="a number of at least 1", got=repr(largest), cure="try 2.0")
    work = widen(gram)
    work = work / power_of_two_scale(work)
    chosen = torch.as_tensor(kept, dtype=torch.int64).tolist()
    count = len(work)
    for _ in range(4 * count if sweeps is None else sweeps):
        rest = sorted(set(range(count)) - set(chosen))
        if not rest or not chosen:
            break
        inner = cholesky(damped_gram(work[chosen][:, chosen], damping=LEAST_DAMPING))
        inverse = torch.cholesky_inverse(inner)
        crossed = work[chosen][:, rest]
        t = torch.cholesky_solve(crossed, inner)
        schur = (torch.diagonal(work)[rest] - (crossed * t).sum(0)).clamp_min(0)
        volume = t.square() + schur * torch.diagonal(inverse)[:, None]
        best = int(volume.argmax())
        i, j = divmod(best, len(rest))
        if float(volume[i, j]) <= largest**2 * (1 + 1e-9):
            break
        chosen[i] = rest[j]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def backward_elimination(
    consumers: Sequence[tuple[Tensor, Tensor]],
    *,
    damping: float = 1e-6,
    share: float = 1 / 32,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The order in which columns are best removed when all others are refitted, and the exact error that this costs.

    A consumer multiplies the columns by its least-squares weight `W`. With `P = K⁻¹`, `K` the damped Gram of its
    inputs, removing a set M and refitting all others raises the squared output error by exactly `tr(W_M P_MM⁻¹ W_Mᵀ)`,
    and `P ← P − P_M P_MM⁻¹ P_Mᵀ`, `W ← W − W_M P_MM⁻¹ P_Mᵀ` are the inverse and the weight of what is left. In each
    step the cheapest few columns are removed together, by low-rank updates.

    Args:
        consumers: Pairs of `K`, shape (C, b, C, b), and `W`, shape (out, C, b), one per consumer of the columns, with b
            inputs per column (k² for a k × k convolution). Rows of `W` carry the weights of the outputs.
        damping: Relative damping of each `K`.
        share: Fraction of the remaining columns that is removed in one step; at least one column is.
        order: Order of removal whose costs are computed, shape (C,); None finds the order.

    Returns:
        Indices in the order of removal, shape (C,), and the summed squared error with the first m columns removed,
        shape (C + 1,), from 0, never falling.
    """
    state = []
    for gram, weight in consumers:
        _, width = weight.shape[1:]
        flat = widen(gram).reshape(weight.shape[1] * width, -1)
        scale = power_of_two_scale(flat)
        inner = cholesky(damped_gram(flat / scale, damping=max(damping, LEAST_DAMPING)))
        seen = flat.trace() > 0  # columns that are all zero cost nothing
        wide = torch.where(seen, widen(weight).flatten(1) * scale.sqrt(), 0.0)
        state.append((torch.cholesky_inverse(inner), wide, width))
    count = consumers[0][1].shape[1]
    left = torch.arange(count)
    removed: list[int] = []
    errors = [0.0]
    while len(left):
        taken = max(1, int(len(left) * share))
        if order is None:
            costs = torch.stack([_removal_costs(*each) for each in state]).sum(0)
            cheapest = costs.argsort(stable=True)[:taken]
        else:
            ahead = order[len(removed) : len(removed) + taken]
            cheapest = torch.searchsorted(left, ahead).to(state[0][0].device)
        removed += left[cheapest.cpu()].tolist()
        joint = torch.stack([_joint_costs(*each, cheapest) for each in state]).sum(0)
        errors += (errors[-1] + joint).tolist()
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[cheapest] = False
        state = [_removed(inverse, weight, width, cheapest, keep) for inverse, weight, width in state]
        left = left[keep]
    return torch.tensor(removed, dtype=torch.int64), torch.tensor(errors, dtype=torch.float64)


def _removal_costs(inverse: Tensor, weight: Tensor, width: int) -> Tensor:
    """`tr(W_j (P_jj)⁻¹ W_jᵀ)` for every column j, shape (C,)."""
    if width == 1:
        return weight.square().sum(0) / torch.diagonal(inverse)
    count = weight.shape[1] // width
    blocks = torch.diagonal(inverse.reshape(count, width, count, width), dim1=0, dim2=2).permute(2, 0, 1)
    own = weight.reshape(-1, count, width).permute(1, 2, 0)  # C × b × out
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), own, upper=False)
    costs: Tensor = solved.square().sum((1, 2))
    return costs


def _places(columns: Tensor, width: int) -> Tensor:
    """Places of the inputs of some columns, `width` each."""
    return (columns[:, None] * width + torch.arange(width, device=columns.device)).flatten()


def _joint_costs(inverse: Tensor, weight: Tensor, width: int, columns: Tensor) -> Tensor:
    """`tr(W_M P_MM⁻¹ W_Mᵀ)` for the first 1, 2, … of some columns: leading blocks have leading Cholesky factors."""
    places = _places(columns, width)
    factor = cholesky(inverse[places][:, places])
    solved = torch.linalg.solve_triangular(factor, weight[:, places].mT, upper=False)
    costs: Tensor = solved.square().sum(1).reshape(-1, width).sum(1).cumsum(0)
    return costs


def _removed(inverse: Tensor, weight: Tensor, width: int, columns: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, int]:
    """The inverse and the weight without some columns."""
    places, others = _places(columns, width), keep.to(inverse.device).repeat_interleave(width)
    crossed = inverse[others][:, places]
    factor = cholesky(inverse[places][:, places])
    solved = torch.cholesky_solve(crossed.mT, factor)
    return inverse[others][:, others] - crossed @ solved, weight[:, others] - weight[:, places] @ solved, width

"""A few rows of a low-rank matrix that all its other rows are combinations of."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.linalg.precision import widen

LARGEST_ENTRY = 1.1  # bound on the coefficients: few more exchanges than for 2, and a fifth less rounding


def row_pivots(left: Tensor, *, largest: float = LARGEST_ENTRY) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `J` of `L` and a table `T` with `L_R = T L_J`, `R` the other rows; exact, with every `|T_ij| ≤ f`.

    The same holds for `W = L M` with any `M`. `L = Q X` by QR, so that scales in `L`, and a rank below its number of
    columns, do not matter: `Q_J` is never singular. The first `J` are the pivots of LU. While an entry `T_ij` is above
    `f`, row `R_i` and row `J_j` change places, which multiplies `|det Q_J|` by `|T_ij|`; it is at most 1, so that ends.

    Args:
        left: Matrix `L`, shape (m, r), r ≤ m.
        largest: Bound `f`, above 1.

    Returns:
        `J`, shape (r,), ascending; `R`, shape (m − r,), ascending; `T`, shape (m − r, r), in the work dtype.

    Raises:
        OptionError: `largest` is not above 1; exchanges would not end.

    References:
        Gu and Eisenstat, SIAM J. Sci. Comput. 17, 1996: strong rank-revealing QR. Of a matrix that has rank r exactly,
        their criterion is the bound on `T` alone, which Goreinov et al. ("How to find a good submatrix", 2010) reach by
        exchanges of rank one; we do it so. PIFA (ICML 2025) stores layers by pivots of plain pivoted QR.
    """
    if not largest > 1:
        raise OptionError("largest", law="a number above 1", got=repr(largest), cure="try 1.1")
    basis = torch.linalg.qr(widen(left)).Q
    count, rank = basis.shape
    if rank == count:
        every = torch.arange(count, device=basis.device)
        return every, every[:0], basis.new_zeros(0, rank)
    permutation, _, _ = torch.linalg.lu(basis)
    rows = permutation.argmax(0)
    kept, others = rows[:rank].clone(), rows[rank:].clone()
    table = _table(basis, kept, others)
    while True:
        place = int(table.abs().argmax())
        i, j = divmod(place, rank)
        pivot = table[i, j].clone()
        if not float(pivot.abs()) > largest:
            break
        row, column = table[i].clone(), table[:, j].clone()
        row[j] -= 1  # both exchanges in one update of rank one
        column[i] += 1
        table -= torch.outer(column, row) / pivot
        kept[j], others[i] = others[i].clone(), kept[j].clone()
    kept, others = kept.sort().values, others.sort().values
    return kept, others, _table(basis, kept, others)


def _table(basis: Tensor, kept: Tensor, others: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve(basis[kept].mT, basis[others].mT).mT
    return solved

"""Pivots of low-rank matrices, against SciPy's pivoted QR."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import OptionError
from rankfold.linalg.pivots import LARGEST_ENTRY, row_pivots
from rankfold.testing.matrices import normal


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 99))
def test_the_other_rows_are_bounded_combinations_of_the_kept_ones(rank: int, rest: int, seed: int) -> None:
    left = normal(rank + rest, rank, seed=seed)
    kept, others, table = row_pivots(left)
    assert sorted([*kept.tolist(), *others.tolist()]) == list(range(rank + rest))
    assert kept.tolist() == sorted(kept.tolist())
    assert table.shape == (rest, rank)
    assert bool((table.abs() <= LARGEST_ENTRY * (1 + 1e-9)).all())
    torch.testing.assert_close(table @ left[kept], left[others], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_below_the_number_of_columns_is_no_matter(rank: int) -> None:
    left = normal(20, rank, seed=1) @ normal(rank, 6, seed=2)
    kept, others, table = row_pivots(left)
    assert bool((table.abs() <= LARGEST_ENTRY * (1 + 1e-9)).all())
    torch.testing.assert_close(table @ left[kept], left[others], rtol=1e-9, atol=1e-10)


def test_scales_of_the_columns_are_no_matter() -> None:
    left = normal(40, 10, seed=3) * torch.logspace(0, -14, 10, dtype=torch.float64)
    kept, others, table = row_pivots(left)
    assert float(table.abs().max()) <= LARGEST_ENTRY
    torch.testing.assert_close(table @ left[kept], left[others], rtol=1e-6, atol=1e-20)


def test_exchanges_bound_what_pivoted_qr_does_not() -> None:
    # Kahan's matrix: QR with column pivoting exchanges nothing, and its table grows with the size.
    count, angle = 40, 1.2
    upper = torch.eye(count).double() - math.cos(angle) * torch.triu(torch.ones(count, count).double(), 1)
    kahan = torch.diag(math.sin(angle) ** torch.arange(count).double()) @ upper
    kahan = kahan * (1 - 1e-6) ** torch.arange(count).double()  # without ties
    rank = count - 1
    left = kahan[:rank].mT  # its rows are the columns of R
    _, _, pivots = scipy.linalg.qr(left.mT.numpy(), mode="economic", pivoting=True)
    by_qr = torch.linalg.solve(left[pivots[:rank].tolist()].mT, left[pivots[rank:].tolist()].mT)
    assert float(by_qr.abs().max()) > 1e4
    assert float(row_pivots(left)[2].abs().max()) <= LARGEST_ENTRY


@pytest.mark.parametrize("bound", [1.0, 0.5, float("nan")])
def test_a_bound_that_exchanges_would_never_reach_is_refused(bound: float) -> None:
    with pytest.raises(OptionError, match="above 1"):
        row_pivots(normal(6, 3, seed=5), largest=bound)


def test_a_smaller_bound_is_kept() -> None:
    left = normal(60, 20, seed=5)
    assert float(row_pivots(left, largest=1.1)[2].abs().max()) <= 1.1
    assert float(row_pivots(left, largest=1.1)[2].abs().max()) < float(row_pivots(left, largest=50.0)[2].abs().max())

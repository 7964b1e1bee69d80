"""Laws of indices as text: what is written is read, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.plan.indices import as_ranges, from_ranges


@given(st.sets(st.integers(0, 400), min_size=1))
def test_what_is_written_is_read(chosen: set[int]) -> None:
    indices = tuple(sorted(chosen))
    assert from_ranges(as_ranges(indices)) == indices


def test_runs_are_written_as_runs() -> None:
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert as_ranges(range(10_000)) == "0-9999"


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "3-1", "1,1", "2-4,3", "5,2", "-1", "1--2", "a", "1 ", "٣", "0-999999999", "1-2-3"]
)
def test_anything_else_is_refused(text: str) -> None:
    assert from_ranges(text) is None

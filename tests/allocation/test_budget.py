"""Budgets: what they accept, and the bounds they become."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.allocation import Budget
from rankfold.cost.resources import Cost
from rankfold.errors import BudgetError

WHOLE = Cost(1000, 2_000_000, 4000)


@pytest.mark.parametrize(
    "bound", [0, 0.0, -1, -0.5, 1.5, 1.0000001, float("nan"), float("inf"), True, False, "0.5", 1 + 2j]
)
@pytest.mark.parametrize("resource", ["params", "macs", "bytes"])
def test_a_bound_that_means_nothing_is_refused(resource: str, bound: object) -> None:
    with pytest.raises(BudgetError, match=rf"Budget\.{resource} · a kept fraction in \(0, 1\]") as caught:
        Budget(**{resource: bound})  # type: ignore[arg-type]
    assert repr(bound) in str(caught.value)


def test_a_budget_without_a_bound_is_refused() -> None:
    with pytest.raises(BudgetError, match="at least one bound"):
        Budget()


def test_a_good_bound_does_not_hide_a_bad_one() -> None:
    with pytest.raises(BudgetError, match=r"Budget\.macs"):
        Budget(params=0.5, macs=0)


def test_a_float_is_a_kept_fraction_and_an_int_absolute() -> None:
    assert Budget(params=0.5, macs=1_500_000, bytes=1.0).bounds(WHOLE) == {
        "params": 500,
        "macs": 1_500_000,
        "bytes": 4000,
    }
    assert Budget(params=1).bounds(WHOLE) == {"params": 1}


def test_only_what_is_bounded_is_in_the_bounds_and_the_json() -> None:
    budget = Budget(macs=0.25)
    assert budget.bounds(WHOLE) == {"macs": 500_000}
    assert budget.to_json() == {"macs": 0.25}


@given(st.integers(1, 100), st.integers(1, 10**9))
def test_a_fraction_is_rounded_down(percent: int, whole: int) -> None:
    bound = Budget(params=percent / 100).bounds(Cost(whole, 1, 1))["params"]
    exact = Fraction(percent, 100) * whole
    assert bound <= exact
    assert bound > exact - 1 - Fraction(1, 10**6)


def test_the_error_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="bound"):
        Budget()

"""The laws of selectors and statistics fail for ones that break them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankfold.allocation import Lagrangian, Option, Problem, RankSelector
from rankfold.errors import BudgetError, CheckpointError
from rankfold.statistics import InputGram, Statistic
from rankfold.testing import SelectorConformance, StatisticConformance, random_problem

ONE = ("params",)


def choosing(select: Any) -> SelectorConformance:
    """The cases for a selector that is only this function."""

    @dataclass(frozen=True)
    class Broken(RankSelector):
        def select(self, problem: Problem) -> tuple[Option, ...]:
            chosen: tuple[Option, ...] = select(problem)
            return chosen

    return type("Suite", (SelectorConformance,), {"selector": Broken()})()


def test_the_unbroken_selector_passes() -> None:
    cases = choosing(Lagrangian().select)
    cases.test_it_takes_one_allowed_option_of_each_site(ONE)
    cases.test_no_bound_is_exceeded(ONE)
    cases.test_nothing_that_fits_and_lowers_the_error_is_left(ONE)
    cases.test_same_problem_same_choice(ONE)


def test_an_overshoot_is_caught() -> None:
    cases = choosing(lambda problem: tuple(options[0] for options in problem.options))
    with pytest.raises(AssertionError):
        cases.test_no_bound_is_exceeded(ONE)
    with pytest.raises(AssertionError):
        cases.test_the_smallest_reachable_budget_is_met()
    with pytest.raises(pytest.fail.Exception):
        cases.test_bounds_that_exclude_each_other_are_an_error()


def test_money_left_on_the_table_is_caught() -> None:
    cases = choosing(lambda p: tuple(min(each, key=lambda option: option.cost.params) for each in p.options))
    with pytest.raises(AssertionError):
        cases.test_nothing_that_fits_and_lowers_the_error_is_left(ONE)
    with pytest.raises(AssertionError):
        cases.test_room_for_everything_costs_no_error(ONE)


def test_options_of_nobody_are_caught() -> None:
    made_up = choosing(lambda problem: tuple(Option(*vars(each[0]).values()) for each in problem.options))
    with pytest.raises(AssertionError):
        made_up.test_it_takes_one_allowed_option_of_each_site(ONE)
    too_few = choosing(lambda problem: Lagrangian().select(problem)[1:])
    with pytest.raises((AssertionError, ValueError)):
        too_few.test_it_takes_one_allowed_option_of_each_site(ONE)


def test_chance_is_caught() -> None:
    def chosen(problem: Problem) -> tuple[Option, ...]:
        return tuple(options[int(torch.randint(len(options), ()))] for options in problem.options)

    with pytest.raises(AssertionError):
        choosing(chosen).test_same_problem_same_choice(ONE)


def test_an_idle_option_is_caught() -> None:
    @dataclass(frozen=True)
    class Idle(RankSelector):
        option: int = 1

        def select(self, problem: Problem) -> tuple[Option, ...]:
            return Lagrangian().select(problem)

    cases = type("Suite", (SelectorConformance,), {"selector": Idle(), "variations": {"option": 2}})()
    with pytest.raises(AssertionError):
        cases.test_every_option_changes_something("option")


def test_random_problems_have_a_solution_and_tight_ones_little_room() -> None:
    for seed in range(10):
        for resources in (ONE, ("params", "macs"), ("params", "macs", "bytes")):
            problem = random_problem(seed, resources=resources)
            assert problem.fits(problem.total(Lagrangian().select(problem)))
        tight = random_problem(seed, tight=True)
        with pytest.raises(BudgetError):
            Problem(
                tight.sites, tight.options, {"params": tight.bounds["params"] - 1}, tight.fixed, tight.original
            ).checked()


@dataclass
class Drifting(InputGram):
    """A Gram that is no sum over positions."""

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        return super().summand(inputs, outputs) * inputs.shape[1]


@dataclass
class Keeping(Statistic):
    """Holds on to its inputs, in their own dtype, groups mixed."""

    name = "keeping"

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        return inputs[0, :1]


def test_a_sum_that_is_none_is_caught() -> None:
    cases = type("Suite", (StatisticConformance,), {"statistic": Drifting})()
    with pytest.raises(AssertionError):
        cases.test_chunks_do_not_matter("cpu")


def test_kept_inputs_mixed_groups_and_narrow_sums_are_caught(tmp_path: Path) -> None:
    cases = type("Suite", (StatisticConformance,), {"statistic": Keeping})()
    for broken in (
        cases.test_it_is_registered,
        lambda: cases.test_inputs_are_not_kept("cpu"),
        lambda: cases.test_it_counts_positions("cpu"),
        lambda: cases.test_groups_do_not_mix("cpu"),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            broken()
    with pytest.raises(CheckpointError, match="keeping"):
        cases.test_saved_and_loaded_it_has_the_same_bits("cpu", tmp_path)

"""What each selector promises beyond the shared laws, against slow answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference.selection import (
    at_the_largest_common_fraction,
    best_by_trying_all,
    best_on_the_hull,
    hull_steps,
    smallest_common_error,
)

from rankfold.allocation import Energy, Lagrangian, Option, Problem, Rounded, Uniform
from rankfold.allocation._base import Table, top_up
from rankfold.errors import OptionError
from rankfold.testing.problems import random_problem, with_bounds

SEEDS = st.integers(0, 10_000)


def tiny(seed: int, *, resources: tuple[str, ...] = ("params",)) -> Problem:
    """Four sites with at most six options each, and bounds that are the cost of a drawn choice."""
    whole = random_problem(seed, sites=4, resources=resources)
    draw = random.Random(seed)
    options = tuple(
        (dense, *(option for option in rest if draw.random() < 5 / max(len(rest), 5))) for dense, *rest in whole.options
    )
    witness = whole.total([draw.choice(each) for each in options]).amounts()
    bounds = {name: witness[name] for name in resources}
    return Problem(whole.sites, options, bounds, whole.fixed, whole.original).checked()


def error(chosen: tuple[Option, ...]) -> float:
    return sum(option.error for option in chosen)


@given(SEEDS)
def test_the_lagrangian_is_between_the_best_and_the_convex_hull(seed: int) -> None:
    problem = tiny(seed)
    found = error(Lagrangian().select(problem))
    whole_steps, relaxed = best_on_the_hull(problem, "params")
    best = best_by_trying_all(problem)
    assert best - 1e-12 <= found <= whole_steps + 1e-12
    # So it is off the best by less than one step of one site.
    largest = max((-change for _, _, change in hull_steps(problem, "params")[2]), default=0.0)
    assert relaxed - 1e-12 <= best
    assert found - best <= largest + 1e-12


@settings(max_examples=20)
@given(SEEDS)
def test_the_lagrangian_meets_several_bounds_wherever_they_can_be_met(seed: int) -> None:
    problem = tiny(seed, resources=("params", "macs"))
    found = Lagrangian().select(problem)
    assert problem.fits(problem.total(found))
    assert error(found) >= best_by_trying_all(problem) - 1e-12


@settings(max_examples=20)
@given(SEEDS)
def test_a_second_bound_that_does_not_bind_changes_little(seed: int) -> None:
    problem = random_problem(seed, sites=5)
    loose = with_bounds(problem, params=problem.bounds["params"], macs=problem.original.macs)
    one, two = error(Lagrangian().select(problem)), error(Lagrangian().select(loose))
    steps = hull_steps(problem, "params")[2]
    largest = max((-change for _, _, change in steps), default=0.0)
    assert two <= one + largest + 1e-12


def test_the_lagrangian_spends_where_the_error_is() -> None:
    problem = random_problem(7, sites=2)
    first, second = problem.options
    heavy = tuple(Option(o.method, o.rank, o.cost, 1000 * o.error) for o in first)
    skewed = Problem(problem.sites, (heavy, second), problem.bounds, problem.fixed, problem.original)
    before, after = Lagrangian().select(problem), Lagrangian().select(skewed)
    assert after[0].error / 1000 <= before[0].error
    assert after[0].cost.params >= before[0].cost.params


@given(SEEDS)
def test_uniform_loses_nothing_against_the_largest_common_fraction(seed: int) -> None:
    problem = random_problem(seed, sites=6)
    common = at_the_largest_common_fraction(problem, "params")
    chosen = Uniform(spared=0).select(problem)
    assert all(option.error <= error for option, error in zip(chosen, common, strict=True))


@given(SEEDS)
def test_uniform_spares_the_smallest_sites_where_the_budget_lets_it(seed: int) -> None:
    problem = random_problem(seed, sites=6)
    costs = [options[0].cost.params for options in problem.options]
    smallest = min(range(6), key=costs.__getitem__)
    chosen = Uniform(spared=costs[smallest] / sum(costs) + 1e-9).select(problem)
    others = sum(min(o.cost.params for o in options) for i, options in enumerate(problem.options) if i != smallest)
    assert (chosen[smallest].method is None) == (others + costs[smallest] <= problem.bounds["params"])
    assert problem.fits(problem.total(chosen))


@pytest.mark.parametrize("spared", [-0.1, 1, True, "0.1"])
def test_a_spared_share_is_below_one(spared: object) -> None:
    with pytest.raises(OptionError, match=r"Uniform\.spared"):
        Uniform(spared=spared)  # type: ignore[arg-type]


@given(SEEDS)
def test_energy_makes_no_error_above_the_smallest_common_one(seed: int) -> None:
    problem = random_problem(seed, sites=6)
    threshold = smallest_common_error(problem, "params")
    assert max(option.error for option in Energy().select(problem)) <= threshold


@given(SEEDS, st.sampled_from([2, 3, 8]))
def test_rounded_ranks_are_multiples(seed: int, multiple: int) -> None:
    def allowed(options: object, option: Option) -> bool:
        return option.rank is None or (isinstance(option.rank, int) and option.rank % multiple == 0)

    problem = random_problem(seed, allowed=allowed)
    chosen = Rounded(multiple=multiple).select(problem)
    assert all(allowed(None, option) for option in chosen)
    assert problem.fits(problem.total(chosen))


def test_rounding_to_one_is_the_selector_itself() -> None:
    problem = random_problem(5)
    assert Rounded(multiple=1).select(problem) == Lagrangian().select(problem)


@pytest.mark.parametrize("multiple", [0, -8, True, 8.0, "8", None])
def test_a_multiple_is_a_whole_number(multiple: object) -> None:
    with pytest.raises(OptionError, match="an int of at least 1"):
        Rounded(multiple=multiple)  # type: ignore[arg-type]


def test_rounded_wraps_an_instance_of_a_selector() -> None:
    with pytest.raises(OptionError, match="an instance of a selector"):
        Rounded(Lagrangian)  # type: ignore[arg-type]


@given(SEEDS, st.sampled_from([("params",), ("params", "macs")]))
def test_topping_up_only_ever_removes_error_and_stays_within(seed: int, resources: tuple[str, ...]) -> None:
    problem = tiny(seed, resources=resources)
    table = Table.of(problem)
    start = next(
        each
        for each in (list(np.random.default_rng(seed + i).integers(0, 1000, 4)) for i in range(10**6))
        if problem.fits(problem.total([o[k % len(o)] for o, k in zip(problem.options, each, strict=True)]))
    )
    start = [int(k) % len(options) for options, k in zip(problem.options, start, strict=True)]
    found = top_up(table, start)
    assert table.error(found) <= table.error(start)
    assert bool((table.cost(found) <= table.bounds).all())


def test_a_bound_beyond_64_bits_is_no_bound() -> None:
    problem = with_bounds(random_problem(9), params=10**30)
    assert error(Lagrangian().select(problem)) == 0

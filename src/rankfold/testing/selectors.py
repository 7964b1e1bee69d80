"""Laws that every selector of ranks keeps."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from rankfold.allocation import Option, Problem, RankSelector
from rankfold.cost.resources import Cost
from rankfold.decompositions import SVD, SpatialSVD
from rankfold.errors import BudgetError
from rankfold.layers import Geometry
from rankfold.registry import from_json, to_json
from rankfold.sites.site import Site
from rankfold.testing.devices import generator_states, same_states
from rankfold.testing.problems import random_problem, with_bounds

_BOUNDED: list[tuple[str, ...]] = [("params",), ("macs",), ("params", "macs"), ("params", "macs", "bytes")]
_SEEDS = range(6)


class SelectorConformance:
    """Every law a selector keeps. Inherit it, name your selector, and run pytest.

    Attributes:
        selector: An instance of the selector.
        variations: Another value of every option of the selector, for the law that it changes something.
    """

    selector: ClassVar[RankSelector]
    variations: ClassVar[Mapping[str, Any]] = {}

    def allowed(self, options: Sequence[Option], option: Option) -> bool:
        """Whether the selector may take an option at all; override it where yours restricts itself."""
        return True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise by the bounded resources and by the options of the selector."""
        if "resources" in metafunc.fixturenames:
            metafunc.parametrize("resources", _BOUNDED, ids="+".join)
        if "option" in metafunc.fixturenames:
            fields = dataclasses.fields(self.selector)  # type: ignore[arg-type]
            metafunc.parametrize("option", [field.name for field in fields])

    def problems(self, resources: Sequence[str], **options: Any) -> list[Problem]:
        """Random problems with a solution the selector may give."""
        return [random_problem(seed, resources=resources, allowed=self.allowed, **options) for seed in _SEEDS]

    def test_it_takes_one_allowed_option_of_each_site(self, resources: tuple[str, ...]) -> None:
        """The choice has one allowed option for each site, in the order of the sites."""
        for problem in self.problems(resources):
            chosen = self.selector.select(problem)
            assert len(chosen) == len(problem.options)
            for options, option in zip(problem.options, chosen, strict=True):
                assert any(option is each for each in options)
                assert self.allowed(options, option)

    def test_no_bound_is_exceeded(self, resources: tuple[str, ...]) -> None:
        """No bound is exceeded by even one parameter, MAC or byte."""
        for problem in self.problems(resources):
            total = problem.total(self.selector.select(problem)).amounts()
            assert all(total[name] <= bound for name, bound in problem.bounds.items())

    def test_the_smallest_reachable_budget_is_met(self) -> None:
        """A bound that leaves only the cheapest choice is no error."""
        for problem in self.problems(("params",), tight=True):
            assert problem.total(self.selector.select(problem)).params <= problem.bounds["params"]

    def test_room_for_everything_costs_no_error(self, resources: tuple[str, ...]) -> None:
        """Where all layers may stay dense, nothing is lost."""
        for problem in self.problems(resources):
            whole = problem.total([options[0] for options in problem.options]).amounts()
            roomy = with_bounds(problem, **{name: whole[name] for name in resources})
            assert sum(option.error for option in self.selector.select(roomy)) == 0

    def test_nothing_that_fits_and_lowers_the_error_is_left(self, resources: tuple[str, ...]) -> None:
        """The result lies as near below the budget as one more step allows."""
        for problem in self.problems(resources):
            chosen = self.selector.select(problem)
            total = problem.total(chosen)
            for options, option in zip(problem.options, chosen, strict=True):
                for other in options:
                    better = other.error < option.error and self.allowed(options, other)
                    assert not (better and problem.fits(total - option.cost + other.cost)), (option, other)

    def test_same_problem_same_choice(self, resources: tuple[str, ...]) -> None:
        """Two calls give the same choice, and the global generators are not touched."""
        before, state = generator_states(), random.getstate()
        for problem in self.problems(resources):
            assert self.selector.select(problem) == self.selector.select(problem)
        assert same_states(before, generator_states())
        assert random.getstate() == state

    def test_bounds_that_exclude_each_other_are_an_error(self) -> None:
        """Of two bounds each can be met alone, but not both: the selector raises `BudgetError` and never overshoots."""
        site = Site("layer", (), "conv", Geometry(8, 8, (3, 3), (1, 1), (1, 1), (1, 1)), (((8, 8), 1),), 4)
        options = (
            Option(None, None, Cost(100, 100, 400), 0.0),
            Option(SVD(), 8, Cost(10, 90, 40), 0.5),
            Option(SpatialSVD(whitened=False), 8, Cost(90, 10, 360), 0.5),
        )
        problem = Problem((site,), (options,), {"params": 20, "macs": 20}, Cost(), Cost(100, 100, 400)).checked()
        with pytest.raises(BudgetError):
            self.selector.select(problem)

    def test_a_model_without_sites_is_no_error(self) -> None:
        """The choice is empty, since there is nothing to choose."""
        assert self.selector.select(Problem((), (), {"params": 0}, Cost(5, 5, 5), Cost(5, 5, 5))) == ()

    def test_it_survives_json(self) -> None:
        """The selector's registered name and its options give an equal selector back."""
        assert from_json(to_json(self.selector), RankSelector, place="test") == self.selector

    def test_every_option_changes_something(self, option: str) -> None:
        """Another value of an option leads to another choice on one of the problems."""
        changed = dataclasses.replace(self.selector, **{option: self.variations[option]})  # type: ignore[type-var]
        assert any(_choice(self.selector, each) != _choice(changed, each) for each in self.problems(("params",)))


def _choice(selector: RankSelector, problem: Problem) -> tuple[Option, ...] | str:
    """The choice of a selector; where its own restrictions leave nothing, the error's text."""
    try:
        return selector.select(problem)
    except BudgetError as infeasible:
        return str(infeasible)

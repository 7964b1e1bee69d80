"""Problems: their options, their bounds, and the errors of those without a solution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.allocation import Budget, Curves, Lagrangian, Rounded
from rankfold.allocation.measuring import measure
from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import Cost
from rankfold.decompositions import SVD, SpatialSVD
from rankfold.errors import BudgetError
from rankfold.sites.finding import find_sites
from rankfold.sites.site import Sites
from rankfold.testing import toy_network
from rankfold.testing.problems import random_problem, with_bounds


@pytest.fixture(scope="module")
def found() -> tuple[Sites, Curves]:
    network, inputs = toy_network()
    sites = find_sites(network, inputs)
    return sites, measure(network, sites=sites, families=[SVD(), SpatialSVD(whitened=False)])


def test_dense_comes_first_and_the_rest_cost_less_in_a_bounded_resource(found: tuple[Sites, Curves]) -> None:
    sites, curves = found
    for budget in (Budget(params=0.5), Budget(macs=0.5), Budget(params=0.5, macs=0.5)):
        problem = curves.problem(budget)
        assert problem.sites == sites.sites
        for site, (dense, *smaller) in zip(sites, problem.options, strict=True):
            assert (dense.method, dense.rank, dense.error, dense.cost) == (None, None, 0.0, dense_cost(site))
            for option in smaller:
                assert any(option.cost.amounts()[name] < dense.cost.amounts()[name] for name in problem.bounds)


def test_bounds_on_the_sites_are_those_on_the_model_less_what_is_fixed(found: tuple[Sites, Curves]) -> None:
    sites, curves = found
    fixed = curves.fixed_cost()
    assert fixed.params == sites.cost.params - sum(dense_cost(site).params for site in sites)
    assert fixed.params > 0
    problem = curves.problem(Budget(params=0.6, bytes=5000))
    assert problem.bounds == {
        "params": int(0.6 * sites.cost.params) - fixed.params,
        "bytes": 5000 - fixed.bytes,
    }


def test_curves_are_found_by_site(found: tuple[Sites, Curves]) -> None:
    sites, curves = found
    for site in sites:
        methods = [curve.method for curve in curves.of(site)]
        assert methods == ([SVD(), SpatialSVD(whitened=False)] if site.geometry.kernel else [SVD()])
    assert sum(len(curves.of(site)) for site in sites) == len(curves)


@pytest.mark.parametrize("resource", ["params", "macs", "bytes"])
def test_an_infeasible_budget_names_the_smallest_reachable_value(found: tuple[Sites, Curves], resource: str) -> None:
    _, curves = found
    with pytest.raises(BudgetError, match="smallest is") as caught:
        curves.problem(Budget(**{resource: 1}))
    smallest = caught.value.smallest[resource]
    assert str(smallest) in str(caught.value)
    problem = curves.problem(Budget(**{resource: smallest}))  # this one can be met, to the last one of it
    assert (problem.total(Lagrangian().select(problem)) + problem.fixed).amounts()[resource] == smallest
    with pytest.raises(BudgetError):
        curves.problem(Budget(**{resource: smallest - 1}))


def test_of_several_bounds_the_broken_ones_are_named(found: tuple[Sites, Curves]) -> None:
    _, curves = found
    with pytest.raises(BudgetError) as caught:
        curves.problem(Budget(params=0.9, macs=1))
    assert caught.value.place == "Budget.macs"
    assert "params at most" not in str(caught.value)
    assert set(caught.value.smallest) == {"params", "macs"}


def test_restricting_keeps_dense_and_checks_again() -> None:
    problem = random_problem(1, tight=True)
    assert [options[0].method for options in problem.restricted(lambda option: True).options] == [None] * 6
    with pytest.raises(BudgetError):
        problem.restricted(lambda option: False)
    roomy = with_bounds(problem, params=problem.original.params)
    assert all(len(options) == 1 for options in roomy.restricted(lambda option: False).options)


def test_rounding_that_makes_a_budget_infeasible_says_so() -> None:
    problem = random_problem(2, tight=True)
    with pytest.raises(BudgetError, match="smallest is"):
        Rounded(multiple=64).select(problem)


def test_a_total_fits_to_the_last_one_and_no_further() -> None:
    problem = random_problem(3)
    bound = problem.bounds["params"]
    assert problem.fits(Cost(bound, 10**15, 10**15))
    assert not problem.fits(Cost(bound + 1, 0, 0))


def test_a_single_layer_has_a_problem_too() -> None:
    layer = nn.Linear(30, 20)
    sites = find_sites(layer, torch.randn(4, 30, generator=torch.Generator().manual_seed(1)))
    problem = measure(layer, sites=sites, families=[SVD()]).problem(Budget(params=0.5))
    (chosen,) = Lagrangian().select(problem)
    assert chosen.rank == (310 - 20) // 50

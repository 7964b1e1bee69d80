"""Branches as moves of the ledger: weighed against ranks and channels on one state, and what it then costs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.reference.branching import inputs, made
from torch import Tensor, nn

import rankfold as rf
from rankfold.channels.elimination import RemovalCurve
from rankfold.channels.ledger import BranchMove, _State
from rankfold.channels.stacks import Widths, stacks_of
from rankfold.cost.counted import count
from rankfold.errors import BudgetError
from rankfold.proposals import Asked, BranchProposer
from rankfold.proposals._reducer import Reducer
from rankfold.sites.finding import find_sites
from rankfold.statistics.collect import collect

NAME = "norms behind"


def reducer() -> Reducer:
    model, data = made(NAME), inputs(NAME)
    sites = find_sites(model, data[0])
    return Reducer.of(model, data[0], sites, collect(model, data, sites=sites))


def widths(own: Reducer, share: float, *, slope: float | None = None) -> Widths:
    """A bound on parameters; errors of channels grow with the square, or there are none."""
    sites, curves = own.sites, []
    if slope is not None:
        groups = rf.find_channels(own.model, sites)
        curves = [
            RemovalCurve(g, torch.arange(g.units), slope * torch.arange(g.units + 1).double().square()) for g in groups
        ]
    bounds = {"params": int(sites.cost.params * share)}
    return Widths(own.model, curves, sites, bounds, stacks_of([curve.group for curve in curves]))


def moves(own: Reducer, errors: dict[str, float] | None = None) -> list[BranchMove]:
    found = [own.move(name) for name in own.branches]
    return (
        found
        if errors is None
        else [BranchMove(each.name, each.paths, errors[each.name], each.beside) for each in found]
    )


def test_a_state_costs_what_the_model_without_the_branches_costs() -> None:
    own = reducer()
    for gone in itertools.chain.from_iterable(itertools.combinations(own.branches, k) for k in (1, 2)):
        state = _State(widths(own, 1.0), None, 1.0, moves(own, dict.fromkeys(own.branches, math.inf)))
        state._losses = [-1.0 if name in gone else math.inf for name in own.branches]
        over = state.settle(np.zeros(1))
        assert state.out == [name in gone for name in own.branches]
        reduced = own.without(gone)
        assert (1 + float(over[0])) * own.sites.cost.params == pytest.approx(
            count(own.model_of(reduced), own.example).params
        )


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_with_nothing_else_to_cut_the_branches_that_cost_least_for_what_they_save_go(share: float) -> None:
    own = reducer()
    errors = {name: float(place + 1) ** 2 for place, name in enumerate(own.branches)}
    gone = rf.Ledger().without(widths(own, share), moves(own, errors))
    assert own.without(gone).cost.params <= share * own.sites.cost.params
    saved = {name: own.sites.cost.params - own.alone[name].cost.params for name in own.branches}
    ratios = {name: errors[name] / saved[name] for name in own.branches}
    assert list(gone) == sorted(gone, key=ratios.__getitem__)
    assert max(ratios[name] for name in gone) <= min((ratios[n] for n in own.branches if n not in gone), default=1e9)
    assert own.without(gone[:-1]).cost.params > share * own.sites.cost.params


def test_a_branch_is_weighed_against_channels() -> None:
    own = reducer()
    cheap = dict.fromkeys(own.branches, 1e-06)
    assert rf.Ledger().without(widths(own, 0.6, slope=1e3), moves(own, cheap))
    dear = dict.fromkeys(own.branches, 1000000000.0)
    assert rf.Ledger().without(widths(own, 0.9, slope=1e-6), moves(own, dear)) == ()


def test_a_branch_of_which_nothing_is_known_stays() -> None:
    own = reducer()
    unknown = dict.fromkeys(own.branches, math.inf)
    with pytest.raises(BudgetError):
        rf.Ledger().without(widths(own, 0.6), moves(own, unknown))


def test_no_single_branch_is_better_turned_round_at_the_price() -> None:
    own = reducer()
    for price in np.logspace(-3, 3, 13):
        state = _State(widths(own, 0.5, slope=0.01), None, 1.0, moves(own))
        prices = np.array([float(price)])
        state.settle(prices)
        assert [state._goes(number, prices) for number in range(len(own.branches))] == state.out


@pytest.mark.parametrize("others", [[rf.WhitenedSVD()], [rf.Interpolative()], [rf.WhitenedSVD(), rf.Interpolative()]])
def test_the_plan_of_the_ledger_with_branches_holds_its_budget(others: list[rf.Family]) -> None:
    model, data = made(NAME), inputs(NAME)
    budget = rf.Budget(params=0.5)
    session = rf.prepare(model, data, families=[rf.Branches(tried=1), *others])
    proposer = next(each for each in session.proposers if isinstance(each, BranchProposer))
    asked = Asked(budget, None, rf.Lockstep(), session.trials.score)
    (plan,) = (each.make() for each in proposer.proposals(asked) if each.name == "ledger with branches")
    out = rf.execute(model, data, plan)
    assert out.report.after == count(out.model, data[0])
    assert out.report.after.params <= 0.5 * out.report.before.params
    chosen = proposer.weighed(proposer.branches(alone=False), asked)  # type: ignore[arg-type]
    assert {each.branch for each in plan.branches} == set(chosen.gone)


class Block(nn.Module):
    def __init__(self, width: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(width), inner
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(self.norm(x)))
        z: Tensor = x + self.last(y if self.inner is None else self.inner(y))
        return z


def test_a_branch_inside_another_saves_nothing_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), Block(10, Block(20)), Block(10), nn.Linear(10, 4)).eval()
    x = torch.randn(60, 8)
    sites = find_sites(model, x)
    own = Reducer.of(model, x, sites, collect(model, [x], sites=sites))
    errors = {"1.inner.last": 1e-6, "1.last": 1e-6, "2.last": 1.0}
    outer = own.without(("1.last",)).cost.params
    for slack in (0, -20):
        bounded = Widths(model, (), sites, {"params": outer + slack}, ())
        gone = rf.Ledger().without(bounded, moves(own, errors))
        assert gone == (("1.last",) if slack == 0 else ("1.last", "2.last"))
        assert own.without(gone).cost.params <= outer + slack

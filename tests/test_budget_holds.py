"""No model is handed back that is over its budget, whatever the plan foretold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.cost.resources import Cost
from rankfold.errors import BudgetError


class OneByOneFails(nn.Module):
    """A model of which one sample alone gets to the batch norm and fails there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.norm = nn.BatchNorm1d(64, track_running_stats=False)
        self.last = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


class Fickle(nn.Module):
    """Calls a layer more often once the output of the one before is not what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.register_buffer("known", self.first.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        same = torch.allclose(hidden, x @ self.known.t(), rtol=1e-3, atol=1e-4)
        for _ in range(1 if same else 8):
            hidden = torch.tanh(self.second(hidden))
        return hidden


def _data(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_budget_holds_on_the_live_module(share: float) -> None:
    torch.manual_seed(0)
    model, data = OneByOneFails(), _data(40, 16)
    before = count(model, data[0])
    assert before.macs == 16 * 64 + 64 * 32
    out = rf.compress(model, data, budget=rf.Budget(macs=share), repair=None, weighting=False)
    assert out.report.after == count(out.model, data[0])
    assert out.report.after.macs <= share * before.macs


@pytest.mark.parametrize(
    ("share", "bound", "options"),
    [(0.6, 460, {}), (0.8, 614, {"selector": rf.Uniform()})],
    ids=["default", "one candidate"],
)
def test_a_model_that_runs_over_its_budget_is_not_handed_back(share: float, bound: int, options: Any) -> None:
    torch.manual_seed(0)
    model, data = Fickle(), _data(16, 16)
    budget = rf.Budget(macs=share)
    law = rf"^Budget\.macs · .* counted .* · got macs at most {bound} where it has \d+ \(of 768\)"
    with pytest.raises(BudgetError, match=law):
        rf.compress(model, data, budget=budget, families=[rf.SVD()], repair=None, weighting=False, **options)


def test_what_one_cut_costs_keeps_the_choice_from_a_layer_that_must_not_be_cut() -> None:
    torch.manual_seed(0)
    model, data = Fickle(), _data(16, 16)
    options: dict[str, Any] = {"families": [rf.SVD()], "repair": None, "weighting": False, "selector": rf.Lagrangian()}
    out = rf.compress(model, data, budget=rf.Budget(macs=0.8), **options)
    assert [decision.site for decision in out.plan.decisions if decision.method is not None] == ["second"]


def test_a_candidate_that_runs_over_its_budget_drops_out_while_another_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), _data(40, 16)
    counts = iter([10**6])

    def first_is_over(live: nn.Module, example: Any) -> Cost:
        return replace(count(live, example), macs=next(counts, count(live, example).macs))

    monkeypatch.setattr("rankfold.trials.trials.count", first_is_over)
    out = rf.compress(model, data, budget=rf.Budget(macs=0.6), repair=None, weighting=False)
    assert sum(" was dropped: Budget.macs · " in note for note in out.report.notes) == 1
    assert count(out.model, data[0]).macs <= 0.6 * out.report.before.macs


def test_a_given_plan_that_runs_over_its_budget_is_handed_back_with_a_note() -> None:
    torch.manual_seed(0)
    model, data = Fickle(), _data(16, 16)
    sites = rf.find_sites(model, data[0])
    curves = rf.measure(model, None, sites=sites, families=[rf.SVD()])
    plan = rf.make_plan(curves, budget=rf.Budget(macs=0.8))
    notes = rf.execute(model, data, plan).report.notes
    assert any(note.startswith("the plan's own budget is not met: macs at most 614") for note in notes)

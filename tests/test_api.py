"""Laws of the whole road: `compress`, and `execute` for a plan that is there already."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.allocation.curve import Option, Problem
from rankfold.cost.counted import count
from rankfold.errors import PlanError
from rankfold.layers import PivotedLayer
from rankfold.registry import to_json
from rankfold.sites.finding import fingerprint
from rankfold.testing import toy_network

MODEL, IMAGES = toy_network()
DATA = [IMAGES[:6], IMAGES[6:]]
BUDGET = rf.Budget(params=0.6, macs=0.8)


@cache
def compressed() -> rf.Compressed:
    """By the default road: weighted curves, both selectors, lockstep repair."""
    return rf.compress(MODEL, DATA, budget=BUDGET)


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same bits under the same names."""
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_budget_holds_on_the_live_model_and_the_prediction_is_exact() -> None:
    out = compressed()
    counted, whole = count(out.model, IMAGES), count(MODEL, IMAGES)
    assert counted.params <= 0.6 * whole.params
    assert counted.macs <= 0.8 * whole.macs
    assert rf.plan_cost(rf.find_sites(MODEL, IMAGES), out.plan) == counted == out.report.after


def test_the_same_seed_gives_the_same_bits_and_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    model, before = copy.deepcopy(MODEL), copy.deepcopy(MODEL.state_dict())
    again = rf.compress(model, DATA, budget=BUDGET)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(again.model, compressed().model)
    assert again.plan.to_json() == compressed().plan.to_json()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_carrying_out_the_plan_again_gives_the_same_bits() -> None:
    out = compressed()
    plan = rf.Plan.from_json(out.plan.to_json())
    assert equal(rf.execute(MODEL, DATA, plan).model, out.model)
    assert equal(rf.apply(MODEL, plan, DATA), out.model)
    model = copy.deepcopy(MODEL)
    assert rf.apply_(model, plan, DATA) is model
    assert equal(model, out.model)


@pytest.mark.parametrize("bound", [0.1, 10])
def test_a_plan_that_misses_its_own_budget_says_which_bound(bound: float) -> None:
    plan = rf.Plan((rf.Decision("9", rf.SVD(), 2),), (), fingerprint(MODEL), budget={"params": bound, "macs": 1.0})
    report = rf.execute(MODEL, DATA, plan).report
    most = rf.Budget(params=bound).bounds(report.before)["params"]
    asked = f"params at most {most} (asked: {bound}), got {report.after.params}"
    assert [note for note in report.notes if "budget" in note] == [f"the plan's own budget is not met: {asked}"]


def test_a_plan_that_keeps_to_its_budget_gets_no_note_and_a_broken_budget_is_refused() -> None:
    plan = rf.Plan((rf.Decision("9", rf.SVD(), 2),), (), fingerprint(MODEL), budget={"params": 1.0})
    assert not any("budget" in note for note in rf.execute(MODEL, DATA, plan).report.notes)
    with pytest.raises(PlanError, match=r"^plan\.budget · only known keys · got 'size'"):
        rf.execute(MODEL, DATA, replace(plan, budget={"size": 0.5}))


def test_save_and_load_give_the_same_bits_and_outputs(tmp_path: Path) -> None:
    out = compressed()
    rf.save(out, tmp_path / "small")
    loaded = rf.load(tmp_path / "small", factory=lambda: toy_network()[0])
    assert equal(loaded, out.model)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), out.model(IMAGES))


def test_the_result_is_of_standard_layers_or_pivoted_ones_and_shares_nothing_with_the_original() -> None:
    out = compressed()
    assert {type(module).__module__.partition(".")[0] for module in out.model.modules()} <= {"torch", "rankfold"}
    assert {type(m) for m in out.model.modules() if type(m).__module__.startswith("rankfold")} <= {
        PivotedLayer,
        *(type(m) for m in MODEL.modules()),
    }
    mine = {value.untyped_storage().data_ptr() for value in out.model.state_dict().values()}
    assert not mine & {value.untyped_storage().data_ptr() for value in MODEL.state_dict().values()}


def test_the_closer_of_the_candidates_is_taken() -> None:
    out = rf.compress(MODEL, DATA, budget=rf.Budget(params=0.5))
    candidates = out.report.candidates
    assert [candidate.selector for candidate in candidates][:2] == ["lagrangian", "half-way"]
    assert len(candidates) == 4  # with few samples, the closer of them with a weaker repair and with none too
    taken = [candidate for candidate in candidates if candidate.taken]
    assert len(taken) == 1
    assert taken[0].divergence == min(candidate.divergence for candidate in candidates)
    assert (out.plan.selector or {})["name"] == re.sub(", (no repair|anchor 0.5)$", "", taken[0].selector)
    assert (out.plan.repair is None) == taken[0].selector.endswith(", no repair")


def test_a_selector_that_is_given_is_taken_as_it_is() -> None:
    out = rf.compress(MODEL, DATA, budget=BUDGET, selector=rf.Uniform(), repair=None, weighting=False)
    assert out.plan.selector == to_json(rf.Uniform())
    assert out.report.candidates == ()


def test_held_out_samples_are_not_fitted_on() -> None:
    stats = compressed().plan.calibration
    assert stats["samples"] == 10  # of 12: the fifth and the tenth are held out
    assert stats["held_out"] == 5
    assert compressed().report.comparison.samples == 2  # type: ignore[union-attr]
    changed = IMAGES.clone()
    changed[9] += 1
    out = rf.compress(MODEL, changed, budget=BUDGET, selector=rf.Uniform(), repair=None)
    plain = rf.compress(MODEL, IMAGES, budget=BUDGET, selector=rf.Uniform(), repair=None)
    assert equal(out.model, plain.model)


def test_few_samples_are_judged_on_what_was_fitted_and_the_report_says_so() -> None:
    out = rf.compress(MODEL, IMAGES[:4], budget=BUDGET, selector=rf.Uniform(), repair=None, weighting=False)
    assert any(note.startswith("fewer than 5 calibration samples") for note in out.report.notes)
    assert out.report.comparison.samples == 4  # type: ignore[union-attr]


def test_what_is_not_selected_stays_as_it_is() -> None:
    out = rf.compress(MODEL, DATA, budget=rf.Budget(params=0.9), only=["3.*", "4"], exclude=["4"], repair=None)
    assert {decision.site for decision in out.plan.decisions} == {"3.body.0"}
    assert isinstance(out.model[4], nn.Conv2d)
    assert torch.equal(out.model[4].weight, MODEL[4].weight)
    assert any(skip.path == "4" and "not selected" in skip.reason for skip in out.plan.skips)


def test_batches_may_be_tensors_tuples_with_labels_or_keywords() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12))

        def forward(self, rows: Tensor) -> Tensor:
            result: Tensor = self.body(rows)
            return result

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, rows = Named().eval(), torch.randn(12, 8)
    outs = [
        rf.compress(model, data, budget=rf.Budget(params=0.8), repair=None, weighting=False).model
        for data in (rows, [(rows, torch.zeros(12, dtype=torch.long))], {"rows": rows}, [{"rows": rows}])
    ]
    assert all(equal(outs[0], other) for other in outs[1:])


def test_other_data_than_the_plans_is_said_in_the_report() -> None:
    out = rf.compress(MODEL, DATA, budget=BUDGET, selector=rf.Uniform(), repair=None, weighting=False)
    assert not any("not the one" in note for note in rf.execute(MODEL, DATA, out.plan).report.notes)
    other = rf.execute(MODEL, [2 * batch for batch in DATA], out.plan)
    assert "the calibration data is not the one that the plan was made with" in other.report.notes
    assert other.plan.calibration["sha256"] != out.plan.calibration["sha256"]


def test_a_site_that_a_given_plan_says_nothing_of_is_left_alone_by_name() -> None:
    plan = replace(compressed().plan, decisions=(rf.Decision("9", rf.SVD(), 2),), repair=None)
    out = rf.execute(MODEL, DATA, plan)
    assert isinstance(out.model[9], nn.Sequential)
    assert {row.path for row in out.report.rows if row.why == "not in the plan"} >= {"0", "3.body.0", "4"}


@dataclass(frozen=True)
class Wasteful(rf.RankSelector):
    """Leaves every site dense, whatever the budget."""

    def select(self, problem: Problem) -> tuple[Option, ...]:
        return tuple(options[0] for options in problem.options)


def test_a_selector_over_the_budget_is_caught() -> None:
    rf.register("wasteful-of-a-test")(Wasteful)
    with pytest.raises(
        PlanError, match=r"^Wasteful · a selector keeps to the budget of \d+ params · got \d+ · this is"
    ):
        rf.compress(MODEL, DATA, budget=BUDGET, selector=Wasteful(), repair=None, weighting=False)


def test_a_model_that_does_not_export_goes_the_road_of_hooks_and_the_report_says_so() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if float(x.detach().sum()) > 1e9:
                x = -x
            result: Tensor = self.second(x)
            return result

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, rows = Branching().eval(), torch.randn(12, 8)
    out = rf.compress(model, rows, budget=rf.Budget(params=0.8))
    assert out.plan.repair is None
    assert any(note.startswith("no graph, module hooks were used") for note in out.report.notes)
    assert count(out.model, rows).params <= 0.8 * count(model, rows).params

"""Laws of the candidates: what is tried where no selector is named, on how many samples, and what is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BudgetError, DataError, NumericsError, SelfCheckError, TraceError
from rankfold.plan import Decision, Plan
from rankfold.proposals import Proposal, plans_from
from rankfold.registry import to_json
from rankfold.trials.attempts import Attempt
from rankfold.trials.trials import FINALISTS, WEAKER, Trials, part_of

BUDGET = rf.Budget(params=0.5)


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()


def _images(samples: int) -> list[Tensor]:
    return list(torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50))


@cache
def many() -> rf.Compressed:
    """With samples enough to choose among many."""
    return rf.compress(_model(), _images(200), budget=BUDGET)


def test_with_many_samples_many_plans_are_tried_and_the_best_go_on() -> None:
    candidates = many().report.candidates
    names = {candidate.selector for candidate in candidates}
    assert {"lagrangian", "half-way"} <= names
    assert {"channels", "channels + lagrangian", "ledger + lagrangian"} <= names
    whole = [candidate for candidate in candidates if candidate.samples is None]
    best = min(whole[:FINALISTS], key=lambda one: one.divergence)
    weaker = [f"{best.selector}, anchor 0.5", f"{best.selector}, no repair"]
    assert [candidate.selector for candidate in whole[FINALISTS:]] == weaker
    assert len(names) + FINALISTS == len(candidates)  # the finalists' trials are told too
    assert {candidate.samples for candidate in candidates} == {None, 100}  # blocks 0, 2, 4, … of five
    (taken,) = [candidate for candidate in candidates if candidate.taken]
    assert taken.divergence == min(candidate.divergence for candidate in whole)
    assert f"carried out on {100} samples only" in many().report.table()


def test_what_is_taken_was_carried_out_on_all_samples() -> None:
    again = rf.execute(_model(), _images(200), many().plan)
    mine, theirs = again.model.state_dict(), many().model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_with_few_samples_there_are_few_candidates_all_carried_out() -> None:
    candidates = rf.compress(_model(), _images(60), budget=BUDGET).report.candidates
    assert [candidate.selector for candidate in candidates] == [
        "lagrangian",
        "half-way",
        "channels",
        "channels + lagrangian",
        "measured ledger + lagrangian",
        *(f"{min(candidates[:5], key=lambda one: one.divergence).selector}, {name}" for name in WEAKER),
    ]
    assert {candidate.samples for candidate in candidates} == {None}


def test_with_few_samples_the_best_is_tried_with_a_weaker_repair_only_where_its_repair_is_the_default() -> None:
    out = rf.compress(_model(), _images(60), budget=BUDGET, repair=rf.Lockstep(anchor=0.75))
    assert not any(", anchor" in one.selector or "no repair" in one.selector for one in out.report.candidates)
    assert (out.plan.repair or {})["anchor"] == 0.75


def test_an_anchor_that_is_taken_is_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = Trials.attempt

    def attempt(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        seen = rightly(self, plan, part)
        halved = "anchor" in (plan.repair or {})
        (only,) = seen.comparison.outputs
        judged = replace(only, divergence=0.1 if halved else 1.0)
        return replace(seen, comparison=replace(seen.comparison, outputs=(judged,)))

    monkeypatch.setattr(Trials, "attempt", attempt)
    out = rf.compress(_model(), _images(60), budget=BUDGET)
    (taken,) = [candidate for candidate in out.report.candidates if candidate.taken]
    assert taken.selector.endswith(", anchor 0.5")
    assert out.plan.repair == to_json(rf.Lockstep(anchor=0.5))
    again = rf.apply(_model(), rf.Plan.from_json(out.plan.to_json()), _images(60)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in out.model.state_dict().items())


def test_a_named_selector_is_the_only_candidate() -> None:
    out = rf.compress(_model(), _images(200), budget=BUDGET, selector=rf.Lagrangian())
    assert out.report.candidates == ()


@pytest.mark.parametrize(("samples", "taken"), [(127, None), (128, 68), (1024, 130)])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_part_does_not_depend_on_how_many_share_it(samples: int, processes: int, taken: int | None) -> None:
    for size in (16, 64, 2000):
        part = part_of(
            list(torch.arange(samples).reshape(-1, 1).split(size)), samples, held_out=10, processes=processes
        )
        assert (None if part is None else sum(len(batch) for batch in part)) == taken
        assert part is None or len(part) >= processes
        assert part is None or all(int(i) // 10 % (2 if samples == 128 else 8) == 0 for batch in part for i in batch)


def _plan(rank: int) -> Plan:
    return Plan((Decision("layer", rf.SVD(), rank),), (), "", "Toy")


def test_equal_plans_are_tried_once_and_impossible_ones_drop_out() -> None:
    def impossible() -> Plan:
        raise BudgetError("Budget.params", law="can be met", got="not", cure="raise it")

    makers = [Proposal("first", lambda: _plan(1)), Proposal("same", lambda: _plan(1)), Proposal("none", impossible)]
    assert list(plans_from(makers, {})) == ["first"]
    makers.append(Proposal("first", lambda: _plan(2)))
    assert list(plans_from(makers, {})) == ["first", "first (2)"]
    with pytest.raises(BudgetError):
        plans_from([Proposal("none", impossible)], {})


class Wide(nn.Module):
    """Channels of it must stay: two layers read a sum of the others' outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(100, 100), nn.Linear(100, 8), nn.Linear(8, 100)

    def forward(self, x: Tensor) -> Tensor:
        """A skip connection around a narrow middle."""
        wide = self.a(x)
        out: Tensor = self.c(torch.relu(self.b(wide))) + wide
        return out


@pytest.mark.parametrize("budget", [rf.Budget(params=0.001), rf.Budget(macs=0.001), rf.Budget(params=0.001, macs=0.9)])
def test_the_smallest_value_named_is_that_of_all_ways(budget: rf.Budget) -> None:
    data = list(torch.randn(60, 100, generator=torch.Generator().manual_seed(0)).split(20))
    smallest = []
    for families in (None, [rf.WhitenedSVD()]):
        with pytest.raises(BudgetError) as caught:
            rf.compress(Wide().eval(), data, budget=budget, families=families)
        assert set(caught.value.smallest) == set(budget.to_json())
        smallest.append(caught.value.smallest)
    assert all(smallest[0][name] <= value for name, value in smallest[1].items())


def test_a_candidate_that_overflows_drops_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = Trials.attempt
    failed: list[Any] = []

    def attempt(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        if (plan.selector or {}).get("name") == "half-way":
            failed.append(plan)
            raise NumericsError("layer", law="finite", got="infinity", cure="none")
        return rightly(self, plan, part)

    monkeypatch.setattr(Trials, "attempt", attempt)
    out = rf.compress(_model(), _images(60), budget=BUDGET, families=[rf.WhitenedSVD(), rf.SpatialSVD()])
    assert failed
    names = [candidate.selector for candidate in out.report.candidates]
    assert names == ["lagrangian", "lagrangian, anchor 0.5", "lagrangian, no repair"]
    assert any(note.startswith("candidate half-way was dropped") for note in out.report.notes)


def test_where_the_best_fail_on_all_samples_the_next_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [candidate.selector for candidate in many().report.candidates if candidate.samples is None][:FINALISTS]
    rightly = Trials.attempt
    failed: list[Any] = []

    def attempt(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        if part is None and len(failed) < len(first):
            failed.append(plan)
            raise SelfCheckError("model", law="the same", got="another", cure="none")
        return rightly(self, plan, part)

    monkeypatch.setattr(Trials, "attempt", attempt)
    out = rf.compress(_model(), _images(200), budget=BUDGET)
    whole = [candidate.selector for candidate in out.report.candidates if candidate.samples is None]
    tried = [candidate for candidate in many().report.candidates if candidate.samples is not None]
    assert len(whole) == min(FINALISTS, len(tried) - FINALISTS) + len(WEAKER)
    assert len(whole) > len(WEAKER)
    assert not set(whole) & set(first)
    assert sum("was dropped" in note for note in out.report.notes) == FINALISTS


def test_without_repair_each_is_carried_out_once_on_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rightly, parts = Trials.attempt, []

    def attempt(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        parts.append(part)
        return rightly(self, plan, part)

    monkeypatch.setattr(Trials, "attempt", attempt)
    out = rf.compress(_model(), _images(200), budget=BUDGET, repair=None)
    assert len(parts) == len(out.report.candidates) > 4
    assert set(parts) == {None}
    assert {candidate.samples for candidate in out.report.candidates} == {None}


class Shuffled:
    """Other batches at each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        order = torch.randperm(60, generator=torch.Generator().manual_seed(self.passes))
        return iter(torch.cat(_images(60))[order].split(20))


def test_data_that_is_shuffled_at_each_pass_is_said() -> None:
    def note(data: Any) -> bool:
        out = rf.compress(_model(), data, budget=BUDGET, families=[rf.SVD()], selector=rf.Uniform())
        return any("other batches at each pass" in one for one in out.report.notes)

    assert note(Shuffled())
    assert not note(_images(60))


class Ends:
    """Batches for a few passes, then none."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Tensor]:
        self.passes -= 1
        return iter(_images(60) if self.passes >= 0 else [])


@pytest.mark.parametrize("passes", range(1, 8))
def test_data_that_ends_between_passes_is_refused(passes: int) -> None:
    with pytest.raises(DataError, match="at least one batch"):
        rf.compress(_model(), Ends(passes), budget=BUDGET)


class Looping(nn.Module):
    """Walks over the samples, so that the traced graph holds their number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        """One sample at a time."""
        return torch.stack([self.b(torch.relu(self.a(x[i]))) for i in range(x.shape[0])])


def test_a_smaller_last_batch_is_refused_where_the_graph_holds_the_size() -> None:
    images = torch.randn(33, 12, generator=torch.Generator().manual_seed(0))
    assert rf.compress(Looping().eval(), list(images[:30].split(10)), budget=BUDGET).report.candidates
    with pytest.raises(TraceError, match=r"every batch is a multiple of 2, .* leaves 1 samples"):
        rf.compress(Looping().eval(), list(images.split(10)), budget=BUDGET)

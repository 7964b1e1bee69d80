"""Laws of the candidates: what is tried where no selector is named, on how many samples, and what is taken."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.candidates import FINALISTS, Maker, Tried, best_of, candidates_of, part_of
from rankfold.errors import BudgetError
from rankfold.metrics.compare import Comparison
from rankfold.plan import Decision, Plan

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


def test_with_many_samples_every_family_is_tried_alone_and_the_best_go_on() -> None:
    candidates = many().report.candidates
    names = {candidate.selector for candidate in candidates}
    assert {"lagrangian", "uniform", "lagrangian, spatial-svd alone", "lagrangian, tucker2 alone"} <= names
    assert {"channels, half-way", "channels, same share", "channels + uniform"} <= names
    assert len(names) == len(candidates)
    whole = [candidate for candidate in candidates if candidate.samples is None]
    assert len(whole) == FINALISTS
    assert {candidate.samples for candidate in candidates} == {None, 100}  # blocks 0, 2, 4, … of ten
    (taken,) = [candidate for candidate in candidates if candidate.taken]
    assert taken.divergence == min(candidate.divergence for candidate in whole)
    assert f"carried out on {100} samples only" in many().report.text()


def test_what_is_taken_was_carried_out_on_all_samples() -> None:
    again = rf.execute(_model(), _images(200), many().plan)
    mine, theirs = again.model.state_dict(), many().model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_with_few_samples_there_are_few_candidates_all_carried_out() -> None:
    candidates = rf.compress(_model(), _images(60), budget=BUDGET).report.candidates
    assert [candidate.selector for candidate in candidates] == [
        "lagrangian",
        "uniform",
        "channels, half-way",
        "channels + lagrangian",
    ]
    assert {candidate.samples for candidate in candidates} == {None}


def test_a_named_selector_is_the_only_candidate() -> None:
    out = rf.compress(_model(), _images(200), budget=BUDGET, selector=rf.Lagrangian())
    assert out.report.candidates == ()


@pytest.mark.parametrize(
    ("samples", "processes", "taken"), [(127, 1, None), (128, 1, 68), (1024, 1, 130), (1024, 99, None)]
)
def test_the_part_has_enough_samples_and_a_batch_for_each_process(
    samples: int, processes: int, taken: int | None
) -> None:
    part = part_of(list(torch.zeros(samples, 1).split(64)), samples, processes=processes)
    assert (None if part is None else sum(len(batch) for batch in part)) == taken


def _plan(rank: int) -> Plan:
    return Plan((Decision("layer", rf.SVD(), rank),), (), "", "Toy")


def test_equal_plans_are_tried_once_and_impossible_ones_drop_out_unless_all_are() -> None:
    def impossible() -> Plan:
        raise BudgetError("Budget.params", law="can be met", got="not", cure="raise it")

    makers = [Maker("first", lambda: _plan(1)), Maker("same", lambda: _plan(1)), Maker("none", impossible)]
    assert [name for name, _ in candidates_of(makers)] == ["first"]
    with pytest.raises(BudgetError):
        candidates_of([Maker("none", impossible)])


def test_the_closest_go_on_in_their_order() -> None:
    tried = [Tried(str(i), _plan(i + 1), _comparison(error), 64) for i, error in enumerate((0.5, 0.1, 0.4, 0.3, 0.2))]
    assert [one.name for one in best_of(tried)] == ["1", "4"]


def _comparison(error: float) -> Comparison:
    same = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    other.load_state_dict({name: value * (1 - error) for name, value in same.state_dict().items()})
    seen = rf.compare(same, other, [torch.randn(16, 2, generator=torch.Generator().manual_seed(0))])
    assert abs(seen.divergence - error**2) < 1e-5
    return seen

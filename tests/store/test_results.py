"""Laws of trials in a work directory: a run that was killed does not repeat them, and gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.kept_work import Net, bits, files
from torch import nn

import rankfold as rf
from rankfold.errors import MemoryLimitError, NumericsError, SelfCheckError
from rankfold.store.results import kept_result
from rankfold.trials import trials


class StoppedError(Exception):
    """Stands for what kills a run."""


def stopping(stage: str, step: int) -> Any:
    @contextmanager
    def progress(name: str, steps: int | None) -> Iterator[Callable[[], None]]:
        seen = 0

        def advance() -> None:
            nonlocal seen
            seen += 1
            if (name, seen) == (stage, step):
                raise StoppedError

        yield advance

    return progress


def run(work: Path | None, **options: Any) -> Any:
    images = list(torch.randn(170, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(50))
    families = [rf.WhitenedSVD(), rf.SpatialSVD(), rf.Tucker2(), rf.Interpolative()]
    return rf.compress(Net(), images, budget=rf.Budget(params=0.3), families=families, work_dir=work, **options)


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every plan that is carried out, and on how many batches."""
    calls: list[tuple[str, int]] = []
    original = trials.carry_out

    def noted(model: Any, target: Any, plan: rf.Plan, **options: Any) -> Any:
        calls.append((plan.to_json(), len(list(options["batches"]))))
        return original(model, target, plan, **options)

    monkeypatch.setattr(trials, "carry_out", noted)
    return calls


@pytest.fixture(scope="module")
def whole() -> Any:
    return run(None)


@pytest.mark.parametrize(("stage", "step", "repeated"), [("trials", 3, 0), ("candidates", 1, 1)])
def test_a_run_that_was_killed_does_not_repeat_trials(
    stage: str, step: int, repeated: int, carried: list[tuple[str, int]], whole: Any, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with pytest.raises(StoppedError):
        run(work, progress=stopping(stage, step))
    before = list(carried)
    carried.clear()
    out = run(work)
    assert len(before) >= 3
    assert len(set(before) & set(carried)) <= repeated  # of the best that was carried out, the walk alone
    assert bits(out) == bits(whole)
    assert out.plan == whole.plan
    assert out.report.candidates == whole.report.candidates


def test_a_finished_run_repeats_no_trial(carried: list[tuple[str, int]], whole: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(work)
    first, kept = len(carried), files(work)
    carried.clear()
    out = run(work)
    assert (first > 3, len(carried)) == (True, 1)  # the one that is handed back
    assert bits(out) == bits(whole)
    assert out.report.candidates == whole.report.candidates
    assert set(files(work)) == set(kept)
    assert all(files(work)[name] == when for name, when in kept.items() if name.startswith("results"))


def test_a_candidate_that_dropped_out_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, carried: list[tuple[str, int]], tmp_path: Path
) -> None:
    original = trials.carry_out
    failed: list[Any] = []

    def fails_once(model: Any, target: Any, plan: rf.Plan, **options: Any) -> Any:
        if not failed and plan.repair is not None:  # not one cut on a few samples
            failed.append(plan)
            raise SelfCheckError("Net", law="it computes the same", got="something else", cure="report it")
        return original(model, target, plan, **options)

    monkeypatch.setattr(trials, "carry_out", fails_once)
    first = run(tmp_path / "work").report
    carried.clear()
    again = run(tmp_path / "work").report
    assert any("was dropped: Net · it computes the same" in note for note in first.notes)
    assert set(again.notes) == set(first.notes)
    assert failed[0].to_json() not in [text for text, _ in carried]


@dataclass(frozen=True)
class Outcome:
    """Every kind of field that is kept."""

    name: str
    error: float
    agreement: float | None
    count: int
    taken: bool
    parts: tuple[float, ...]
    named: dict[str, float]


def _never() -> Outcome:
    raise AssertionError("worked out again")


@pytest.mark.parametrize("error", [0.1 + 0.2, math.inf, -0.0, 5e-324])
def test_a_result_comes_back_with_the_same_bits(error: float, tmp_path: Path) -> None:
    outcome = Outcome("a", error, None, 3, True, (error, 1.0), {"head": error})
    file = tmp_path / "deep" / "one.json"
    assert kept_result(file, Outcome, lambda: outcome) is outcome
    kept = kept_result(file, Outcome, _never)
    assert kept == outcome
    assert math.copysign(1, kept.error) == math.copysign(1, error)


def test_an_error_that_lasts_is_kept_and_one_that_may_pass_is_not(tmp_path: Path) -> None:
    def raising(error: type[Any]) -> Callable[[], Outcome]:
        def work() -> Outcome:
            raise error("place", law="law", got="got", cure="cure")

        return work

    with pytest.raises(MemoryLimitError):
        kept_result(tmp_path / "one.json", Outcome, raising(MemoryLimitError))
    with pytest.raises(NumericsError):
        kept_result(tmp_path / "one.json", Outcome, raising(NumericsError))
    with pytest.raises(NumericsError, match="place · law · got got · cure"):
        kept_result(tmp_path / "one.json", Outcome, _never)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"content": {"result": {"name": "b"}}, "sha256": "0"}'])
def test_a_damaged_result_is_worked_out_again(text: str, tmp_path: Path) -> None:
    outcome = Outcome("a", 1.0, 0.5, 3, True, (), {})
    (tmp_path / "one.json").write_text(text)
    assert kept_result(tmp_path / "one.json", Outcome, lambda: outcome) is outcome
    assert kept_result(tmp_path / "one.json", Outcome, _never) == outcome


def test_curves_at_multiples_are_not_those_of_all_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU(), nn.Conv2d(40, 24, 3)).eval()
    data = [torch.randn(48, 8, 9, 9)]
    options: dict[str, Any] = {"families": [rf.Tucker2()], "budget": rf.Budget(params=0.5), "repair": None}
    for first, second in ((rf.Lagrangian(), rf.Rounded(multiple=8)), (rf.Rounded(multiple=8), rf.Lagrangian())):
        work = tmp_path / type(first).__name__
        rf.compress(model, data, selector=first, work_dir=work, **options)
        kept = rf.compress(model, data, selector=second, work_dir=work, **options)
        fresh = rf.compress(model, data, selector=second, **options)
        assert kept.plan.decisions == fresh.plan.decisions

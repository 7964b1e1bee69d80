"""What a fresh pair of eyes broke: models and data that the other tests did not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import DataError, NumericsError
from rankfold.plan import Plan
from rankfold.statistics.gradients import collect_gradients
from rankfold.store.work import Work
from rankfold.trials.attempts import Attempt
from rankfold.trials.trials import Trials


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def depthwise() -> nn.Module:
    """Its third convolution can lose channels and nothing else."""
    torch.manual_seed(0)
    convs = (nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 24, 3, padding=1), nn.Conv1d(24, 24, 3, groups=24))
    body = [layer for conv in (*convs, nn.Conv1d(24, 32, 1)) for layer in (conv, nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 6)).eval()


@pytest.mark.parametrize("families", [None, [rf.WhitenedSVD(), rf.Interpolative()]])
def test_a_plan_without_cuts_that_decides_on_what_can_only_be_cut_is_carried_out_again(families: Any) -> None:
    model, data = depthwise(), [drawn(20, 4, 9, seed=seed) for seed in range(4)]
    for selector in (None, rf.Lagrangian()):
        out = rf.compress(model, data, budget=rf.Budget(params=0.75), families=families, selector=selector)
        assert same(rf.execute(model, data, out.plan).model, out.model)
        assert same(rf.apply(model, out.plan, data), out.model)
        assert selector is not None or any(decision.site == "4" for decision in out.plan.decisions)  # the depthwise one
        bare = replace(out.plan, channels=(), cuts={}, attributes={}, removal=None, width_selector=None)
        assert same(rf.apply(model, bare, data), rf.execute(model, data, bare).model)


@dataclass
class Scores:
    """An output that torch's pytrees do not know."""

    logits: Tensor
    more: Any = None


class Packed(Mapping[str, Any]):
    """A mapping that torch's pytrees do not know."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Wrapping(nn.Module):
    """Hands its output out in some container."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.wrap = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.body(x))


WRAPS = {
    "dataclass": Scores,
    "in a tuple": lambda y: (Scores(y),),
    "in a dict": lambda y: {"x": y * 2, "o": Scores(y)},
    "that holds more": lambda y: Scores(y, {"feats": (y.relu(), [y.sin()])}),
    "mapping": lambda y: Packed(logits=y),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_outputs_in_any_container_are_checked_after_the_repair(wrap: str) -> None:
    model = Wrapping(WRAPS[wrap]).eval()
    out = rf.compress(model, [drawn(40, 16, seed=seed) for seed in range(3)], budget=rf.Budget(params=0.7))
    assert any(note.startswith("self-check") for note in out.report.details)


def test_kept_statistics_are_on_the_device_with_both_halves(tmp_path: Path) -> None:
    model, data = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).eval(), [drawn(20, 6)]
    sites = rf.find_sites(model, data[0])
    stats = Work(tmp_path, torch.device("meta")).statistics(lambda: rf.collect(model, data, sites=sites))
    sums = [each for own in stats.sites.values() for one in own.values() for each in (one.total, one.first)]
    assert {each.device.type for each in sums if each is not None} == {"meta"}


def test_the_size_of_many_logits_in_half_precision_is_finite() -> None:
    logits = 4 * drawn(32, 600)
    expected = float(rf.Logits().size(logits))
    assert float(rf.Logits().size(logits.half())) == pytest.approx(expected, rel=1e-2)
    assert expected**2 > torch.finfo(torch.float16).max


def test_a_candidate_without_repair_that_fails_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rightly = Trials.attempt

    def attempt(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        if plan.repair is None:
            raise NumericsError("layer", law="finite", got="infinity", cure="none")
        return rightly(self, plan, part)

    monkeypatch.setattr(Trials, "attempt", attempt)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    out = rf.compress(model, [drawn(60, 16)], budget=rf.Budget(params=0.6))
    assert out.plan.repair is not None
    assert any("no repair was dropped" in note for note in out.report.notes)


def test_a_shift_of_all_logits_is_no_part_of_the_error_that_is_printed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        model[2].bias += 1000.0  # type: ignore[assignment]
    out = rf.compress(model, [drawn(200, 16)], budget=rf.Budget(params=0.3), outputs=rf.Logits())
    comparison = out.report.comparison
    assert comparison is not None
    assert comparison.relative_error < 1e-5 < comparison.divergence
    assert f"relative output error {comparison.divergence:.3g}" in out.report.text()


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_gradients_are_halved_by_the_place_in_the_data_and_not_in_the_batch(batch: int) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).eval(), drawn(100, 6)
    data = list(x.split(batch))
    sites = rf.find_sites(model, x)
    stats = rf.collect(model, data, sites=sites)
    collect_gradients(model, data, stats, sites=sites)
    own = stats.sites["0"]["gradient-gram"]
    assert (own.count, own.first_count) == (100, 50)


@pytest.mark.parametrize("samples", [1, 100])
def test_samples_that_are_all_the_same_are_one(samples: int) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    plan = rf.compress(model, [drawn(20, 16)], budget=rf.Budget(params=0.7)).plan
    data = [drawn(1, 16).expand(samples, 16).clone()]
    for work in (
        lambda: rf.compress(model, data, budget=rf.Budget(params=0.7)),
        lambda: rf.execute(model, data, plan),
    ):
        with pytest.raises(
            DataError, match=r"several calibration samples.* got 1(00 samples that are all the same| sample)"
        ):
            work()

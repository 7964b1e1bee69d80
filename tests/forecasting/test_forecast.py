"""Laws of the dry run: it predicts, changes nothing, costs a few forward passes, and says what can be reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.rates import Rates, _shrunk
from rankfold.errors import BudgetError, OptionError
from rankfold.forecasting import forecast
from rankfold.proposals import numbers_of
from rankfold.trials.trials import WEAKER


class Table(nn.Embedding):
    """A table that may compute something else, for all that is known of it."""

    def forward(self, ids: Tensor) -> Tensor:
        """The rows."""
        return super().forward(ids)


class Net(nn.Module):
    """Two convolutions and a head, beside an embedding that cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.table = Table(300, 16)
        self.head = nn.Linear(16, 8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(x + self.table(torch.zeros_like(x[:, 0], dtype=torch.int64)))  # type: ignore[no-any-return]


def images(samples: int = 170) -> list[Tensor]:
    return list(torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(1)).split(50))


def dry(model: nn.Module | None = None, **options: Any) -> rf.Forecast:
    options = {"budget": rf.Budget(params=0.5), **options}
    return rf.compress(model or Net(), options.pop("data", images()), dry_run=True, **options)


@pytest.fixture(scope="module")
def found() -> rf.Forecast:
    return dry()


def test_a_dry_run_changes_nothing_and_runs_few_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, samples = Net().train(), [0]
    model.first.register_forward_hook(lambda *args: samples.__setitem__(0, samples[0] + len(args[1][0])))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("rankfold.session.collect", None)  # no statistics
    state = torch.get_rng_state()
    data = images(5000)
    result = dry(model, data=data, work_dir=tmp_path / "work")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert samples[0] <= 6 * 50
    assert result.samples == 5000
    assert not (tmp_path / "work").exists()


def test_predicted_stages_are_those_of_the_report(found: rf.Forecast) -> None:
    out = rf.compress(Net(), images(), budget=rf.Budget(params=0.5))
    assert set(found.seconds) == set(out.report.seconds)
    assert found.original == out.report.before
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.peak_memory == max(found.memory.values())
    assert len(out.report.candidates) <= sum(found.trials)
    assert sum(one.samples is None for one in out.report.candidates) == found.trials[1]


@pytest.mark.parametrize(
    ("families", "selector", "samples"),
    [
        (None, None, 170),
        (None, None, 60),
        (None, rf.Uniform(), 170),
        ([rf.WhitenedSVD()], None, 170),
        ([rf.WhitenedSVD(), rf.Interpolative()], rf.Lagrangian(), 60),
        ([rf.Interpolative()], None, 170),
        ([rf.Interpolative()], rf.SameShare(), 60),
    ],
)
def test_as_many_plans_are_predicted_as_are_asked_for(
    families: Any, selector: Any, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(makers: Any, bounds: Any) -> Any:
        asked.append(len(makers))
        raise BudgetError("Budget", law="counted", got="enough", cure="none")

    monkeypatch.setattr("rankfold.trials.trials.plans_from", counted)
    options = {"families": families, "selector": selector, "data": images(samples)}
    predicted = dry(**options).trials
    with pytest.raises(BudgetError, match="counted"):
        rf.compress(Net(), options["data"], budget=rf.Budget(params=0.5), families=families, selector=selector)
    weaker = len(WEAKER) * (asked[0] > 1)  # below 500 samples the best of several is tried with weaker repairs too
    assert asked[0] in (predicted[0], predicted[1] - weaker)
    assert (predicted[0] > 0) == (samples == 170 and asked[0] > 2)


def test_more_samples_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "timed", lambda self, work, repeats=1: 1e-3)  # on any machine, however busy
    found, many = dry(), dry(data=images(3000))
    assert many.seconds["repair"] > found.seconds["repair"]
    assert many.memory["repair"] > found.memory["repair"]
    assert many.memory["curves"] == found.memory["curves"]  # moments know no samples


def test_what_blocks_a_budget_is_named() -> None:
    found = dry(families=[rf.WhitenedSVD()])
    first = found.blockers[0]
    assert first.path == "table"
    assert first.share == pytest.approx(4800 / found.original.params)
    assert first.reason
    assert found.unreachable == ("params",)
    assert "NOT reachable" in str(found)
    assert "table: 68.4%" in str(found)
    assert found.smallest["params"] > 4800
    assert found.cuttable["params"] == pytest.approx(1 - 4800 / found.original.params)


def test_what_loses_channels_with_others_blocks_nothing(found: rf.Forecast) -> None:
    assert "table" not in [blocker.path for blocker in found.blockers]
    assert found.cuttable["params"] == pytest.approx(1)
    assert found.unreachable == ()


@pytest.mark.parametrize("families", [[rf.WhitenedSVD()], [rf.Interpolative()], None])
def test_the_smallest_that_is_predicted_can_be_reached(families: Any) -> None:
    least = dry(families=families).smallest["params"]
    rf.compress(Net(), images(40), budget=rf.Budget(params=least), families=families)
    if families is not None:
        with pytest.raises(BudgetError):
            rf.compress(Net(), images(40), budget=rf.Budget(params=least - 1), families=families)


def test_a_forecast_is_data_and_text(found: rf.Forecast) -> None:
    value = json.loads(found.to_json())
    assert value["version"] == forecast.VERSION
    assert value["total_seconds"] == found.total_seconds
    for words in ("Net, 170 samples", "repair:", "layers that take most", "lie in layers that can be cut"):
        assert words in found.text()


def test_a_dry_run_is_yes_or_no() -> None:
    with pytest.raises(OptionError, match="dry_run · True or False"):
        rf.compress(Net(), images(), budget=rf.Budget(params=0.5), dry_run=1)  # type: ignore[call-overload]


def test_a_method_of_ones_own_is_timed_like_others() -> None:
    rates = Rates(torch.device("cpu"))
    small, large = (rates.errors(rf.WhitenedSVD(), (16, each, 3, 3)) for each in (16, 256))
    assert 0 < small < large
    assert _shrunk((1000, 256, 3, 3), 320) == (320, 32, 3, 3)
    assert _shrunk((8, 1, 512), 320) == (8, 1, 256)


def test_counts_of_plans_follow_the_families() -> None:
    every = [rf.WhitenedSVD(), rf.SpatialSVD(), rf.Tucker2(), rf.Interpolative()]
    assert numbers_of(every, chosen_by=False) == (6, 5)
    assert numbers_of(every[:1], chosen_by=True) == (1, 1)

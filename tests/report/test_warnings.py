"""A report says when a network is ruined, when samples are few, and what it was judged on."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.comparison.compare import Comparison
from rankfold.errors import DataError
from rankfold.report.data import Candidate
from rankfold.report.warnings import FEW_SAMPLES, wilson


class Gives(nn.Module):
    """Gives one output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(kind: rf.Output, noise: float) -> Comparison:
    first = draw(100, 8)
    return rf.compare(Gives(first), Gives(first + noise * draw(100, 8, seed=1)), [torch.zeros(100, 1)], outputs=kind)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 6)).eval()


def compressed(samples: int) -> rf.Report:
    return rf.compress(
        network(), [draw(samples, 16)], budget=rf.Budget(params=0.3), families=[rf.WhitenedSVD()], outputs=rf.Logits()
    ).report


REPORT = compressed(60)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (rf.Logits(), r"% of the decisions are the same \(95 % interval "),
        (rf.Values(), "the relative error is "),
        (rf.Embedding(), "the mean cosine is "),
    ],
)
def test_a_ruined_network_is_warned_of_before_its_time(kind: rf.Output, what: str) -> None:
    slow = replace(REPORT, latency=2.0, latency_spread=(1.9, 2.1), samples=500)
    ruined = replace(slow, comparison=seen(kind, 1.0)).warnings
    assert len(ruined) == 2
    assert what.replace("\\", "") in ruined[0]
    assert "on 100 held-out inputs" in ruined[0]
    assert "SLOWER" in ruined[1]
    assert len(replace(slow, comparison=seen(kind, 0.01)).warnings) == 1


def test_of_several_outputs_the_ruined_one_is_named() -> None:
    first = (draw(50, 4), draw(50, 4, seed=1))
    pair = Gives(first), Gives((first[0], first[1] * 0))  # type: ignore[arg-type]
    comparison = rf.compare(*pair, [torch.zeros(50, 1)], outputs=rf.Values())
    (line,) = replace(REPORT, comparison=comparison, latency=None, samples=500).warnings
    assert "no longer the original in [1]: the relative error is 1, on 50 held-out inputs" in line


def test_held_out_is_only_said_of_samples_nothing_was_fitted_on() -> None:
    report = compressed(4)
    assert not report.held_out
    assert report.samples == 4
    text = report.text() + report.table(width=200)
    assert "on the 4 calibration inputs it was fitted on: agreement" in text
    assert "held-out inputs:" not in text
    assert "held-out divergence" not in text
    assert any("none was held out" in line for line in report.warnings)
    assert "held-out inputs: agreement" in REPORT.text()


def test_few_samples_are_warned_of() -> None:
    for samples, warned in ((FEW_SAMPLES - 1, True), (FEW_SAMPLES, False)):
        few = replace(REPORT, samples=samples, comparison=None, latency=None)
        assert any(f"only {samples} calibration samples" in line for line in few.warnings) == warned


@pytest.mark.parametrize("data", [draw(1, 16), [draw(1, 16)]])
def test_a_single_sample_is_refused(data: object) -> None:
    with pytest.raises(DataError, match=r"several calibration samples.* · got 1 sample · pass some hundred"):
        rf.compress(network(), data, budget=rf.Budget(params=0.5))


def test_trials_of_the_finalists_stay_in_the_report() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()
    candidates = rf.compress(model, [draw(200, 3, 8, 8)], budget=rf.Budget(params=0.5)).report.candidates
    whole = {re.sub(", (no repair|anchor 0.5)$", "", one.selector) for one in candidates if one.samples is None}
    tried = {one.selector for one in candidates if one.samples is not None}
    assert whole
    assert whole < tried
    text = replace(REPORT, candidates=(Candidate("a", 0.1, None, True), Candidate("a", 0.2, None, False, 64))).table()
    assert "a 0.1 (taken)" in text
    assert "carried out on 64 samples only:\n  a 0.2" in text


def test_the_interval_is_that_of_wilson() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10)[1] == 1.0

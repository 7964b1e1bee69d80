"""Measured speed is a ratio of two clocks that run in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankfold.cost import latency
from rankfold.cost.latency import latency_ratio


class Clock:
    """A clock that stands still until a model moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Takes(nn.Module):
    """A model whose forward takes so many seconds of that clock."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(latency, "time", result)
    return result


X = torch.zeros(2, 3)


def test_the_ratio_is_compressed_over_original(clock: Clock) -> None:
    assert latency_ratio(Takes(clock, [0.4]), Takes(clock, [0.1]), X).ratio == pytest.approx(0.25)
    assert latency_ratio(Takes(clock, [0.1]), Takes(clock, [0.3]), X).ratio == pytest.approx(3.0)


def test_the_first_run_of_each_is_no_measurement(clock: Clock) -> None:
    assert latency_ratio(Takes(clock, [50.0, 0.2]), Takes(clock, [90.0, 0.1]), X).ratio == pytest.approx(0.5)


def test_one_outlier_does_not_count(clock: Clock) -> None:
    assert latency_ratio(Takes(clock, [0.2]), Takes(clock, [0.1, 0.1, 7.0, 0.1]), X).ratio == pytest.approx(0.5)


def test_three_pairs_are_the_least_and_two_hundred_the_most(clock: Clock) -> None:
    slow, quick = Takes(clock, [9.0]), Takes(clock, [1e-6])
    latency_ratio(slow, slow, X, seconds=0.001)
    assert slow.calls == 2 * (1 + 3)
    latency_ratio(quick, quick, X, seconds=100.0)
    assert quick.calls == 2 * (1 + 200)


def test_modes_are_left_as_they_were(clock: Clock) -> None:
    first, second = Takes(clock, [0.1]).train(), Takes(clock, [0.1]).eval()
    latency_ratio(first, second, X)
    assert first.training
    assert not second.training


def test_the_spread_is_that_of_the_pairs(clock: Clock) -> None:
    seen = latency_ratio(Takes(clock, [1.0]), Takes(clock, [1.0, 1.0, 1.2, 0.8]), X, seconds=0.0)
    assert seen.lower < 1 < seen.upper
    assert seen.lower == pytest.approx(0.9)
    assert seen.upper == pytest.approx(1.1)


def test_the_two_take_turns_in_going_first(clock: Clock) -> None:
    order: list[str] = []

    class Told(Takes):
        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return super().forward(x)

    first, second = Told(clock, [1.0]), Told(clock, [1.0])
    first.name, second.name = "a", "b"  # type: ignore[assignment]
    latency_ratio(first, second, X, seconds=0.0)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]

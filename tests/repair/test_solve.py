"""The ridge of the repair: against least squares written out, and as a dial for samples that are few."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankfold.repair.moments import PairMoments, SplitMoments
from rankfold.repair.site import doubt
from rankfold.repair.solve import as_moments, ridge

HERE = torch.device("cpu")


def moments(x: Tensor, y: Tensor) -> SplitMoments:
    """Of one group; every other row is of the first half."""
    result = SplitMoments.zeros(1, x.shape[1], y.shape[1], HERE)
    result.first.update(x[None, ::2], y[None, ::2])
    result.second.update(x[None, 1::2], y[None, 1::2])
    return result


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_with_many_samples_the_ridge_is_least_squares_drawn_to_the_original(bias: bool) -> None:
    x = drawn(5000, 6) + 1
    weight, true = drawn(3, 6, seed=1), drawn(3, 6, seed=2)
    y = x @ true.mT + 2.0 * bias
    got, level = ridge(moments(x, y), 0, weight, bias=bias, strength=1e-3)
    assert level == 1e-3
    centre = x.mean(0) if bias else torch.zeros(6, dtype=torch.float64)
    second = (x - centre).mT @ (x - centre) / len(x)
    damping = 1e-3 * second.diagonal().diag()
    expected = (true @ second + weight @ damping) @ torch.linalg.inv(second + damping)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert (got - true).norm() < 0.01 * (weight - true).norm()


def test_a_gram_that_rounding_left_indefinite_is_solved_all_the_same() -> None:
    """Sums of products in float32 can leave a direction slightly below zero."""
    root = torch.linalg.qr(drawn(4, 4))[0]
    second = (root * torch.tensor([4.0, 1.0, 0.5, -1e-4], dtype=torch.float64)) @ root.mT
    own = SplitMoments.zeros(1, 4, 2, HERE)
    for part in (own.first, own.second):
        part.count = 50_000
        part.xx = second[None] * part.count
        part.yx = drawn(1, 2, 4, seed=1) * part.count
    got, _ = ridge(own, 0, torch.zeros(2, 4, dtype=torch.float64), bias=False, strength=1e-6)
    assert bool(torch.isfinite(got).all())


def loss(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float((y - x @ weight.mT).square().mean())


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_a_repair_that_few_samples_do_not_bear_is_made_weaker_and_helps(noise: float) -> None:
    """Forty samples of forty inputs: full least squares follows their noise, the original weight is off by a little."""
    true = drawn(8, 40)
    weight = true + 0.2 * drawn(8, 40, seed=1)
    x, test = drawn(40, 40, seed=2), drawn(4000, 40, seed=3)
    y = x @ true.mT + noise * drawn(40, 8, seed=4)
    target = test @ true.mT
    got, level = ridge(moments(x, y), 0, weight, bias=False, strength=1e-3)
    full = torch.linalg.lstsq(x, y).solution.mT
    assert loss(got, test, target) <= min(loss(full, test, target), loss(weight, test, target)) * 1.001
    assert level > 1e-3


def test_a_repair_of_pure_chance_leaves_the_original_weight() -> None:
    weight = drawn(8, 40)
    x = drawn(40, 40, seed=2)
    got, level = ridge(moments(x, x @ weight.mT + 5 * drawn(40, 8, seed=4)), 0, weight, bias=True, strength=1e-3)
    assert math.isinf(level)
    assert torch.equal(got, weight)


def test_the_scale_of_an_input_does_not_move_the_repair() -> None:
    """An input given in millionths is repaired as the same input in ones."""
    true, weight = drawn(3, 12), drawn(3, 12, seed=1)
    x = drawn(30, 12, seed=2)
    y = x @ true.mT + 0.5 * drawn(30, 3, seed=3)
    scales = torch.logspace(-6, 6, 12, dtype=torch.float64)
    got, level = ridge(moments(x, y), 0, weight, bias=True, strength=1e-3)
    other, same = ridge(moments(x * scales, y), 0, weight / scales, bias=True, strength=1e-3)
    assert level == same
    assert torch.allclose(other * scales, got, rtol=1e-6)
    one, two = (as_moments(moments(each, y), 0, bias=True, gradient_gram=None).gram for each in (x, x * scales))
    assert one is not None
    assert two is not None
    assert torch.allclose(two / scales / scales[:, None], one, rtol=1e-6, atol=1e-9)


def test_a_site_that_saw_only_zeros_keeps_its_weight() -> None:
    weight = drawn(2, 5)
    got, level = ridge(moments(torch.zeros(9, 5), torch.ones(9, 2)), 0, weight, bias=False, strength=1e-3)
    assert torch.equal(got, weight)
    assert math.isinf(level)


def test_without_halves_the_ridge_goes_by_the_number_of_samples() -> None:
    true, weight = drawn(3, 20), drawn(3, 20, seed=1)
    levels = []
    for count in (25, 20_000):
        x = drawn(count, 20, seed=2)
        own = SplitMoments.zeros(1, 20, 3, HERE)
        own.first.update(x[None], (x @ true.mT)[None])
        levels.append(ridge(own, 0, weight, bias=False, strength=1e-3)[1])
    assert levels[0] > 0.1
    assert levels[1] < 0.01


def test_halves_together_are_all() -> None:
    x, y = drawn(31, 4), drawn(31, 2, seed=1)
    whole = PairMoments.zeros(1, 4, 2, HERE)
    whole.update(x[None], y[None])
    fit = moments(x, y).fit
    assert fit.count == whole.count
    for name in ("xx", "yx", "x", "y", "yy"):
        assert torch.allclose(getattr(fit, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("strength", [1e-3, 1e-5, 0.5])
def test_the_search_finds_the_best_of_all_levels(noise: float, strength: float) -> None:
    x = drawn(60, 20)
    weight, true = drawn(3, 20, seed=1), drawn(3, 20, seed=1) + 0.3 * drawn(3, 20, seed=2)
    y = x @ true.mT + noise * drawn(60, 3, seed=3)
    halves = [(x[::2], y[::2]), (x[1::2], y[1::2])]

    def error(level: float) -> float:
        total = 0.0
        for (a, b), (c, d) in (halves, halves[::-1]):
            second = a.mT @ a / len(a)
            fitted = weight + ((b.mT @ a / len(a)) - weight @ second) @ torch.linalg.inv(
                second + level * second.diagonal().diag()
            )
            total += float((d - c @ fitted.mT).square().sum() / len(c))
        return total

    levels = [strength * 10**step for step in range(12) if strength * 10**step < 320]
    plain = sum(float((d - c @ weight.mT).square().sum() / len(c)) for c, d in halves)
    best = min(levels, key=error)
    _, found = ridge(moments(x, y), 0, weight, bias=False, strength=strength)
    if error(best) >= plain:
        assert math.isinf(found)
    else:
        assert found == pytest.approx(max(strength, best / 2))


def test_a_gain_is_doubted_more_where_fewer_samples_judge() -> None:
    assert doubt(0) == 0
    assert doubt(10) == pytest.approx(0.05, abs=0.001)
    assert doubt(1000) < 0.01 < doubt(100)

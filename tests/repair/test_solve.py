"""The ridge of the repair, against least squares written out."""

from __future__ import annotations

import pytest
import torch

from rankfold.repair.moments import PairMoments
from rankfold.repair.solve import ridge


def moments(x: torch.Tensor, y: torch.Tensor) -> PairMoments:
    """Of one group."""
    result = PairMoments.zeros(1, x.shape[1], y.shape[1], torch.device("cpu"))
    result.update(x[None], y[None])
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_with_many_samples_the_ridge_is_least_squares_drawn_to_the_original(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 6, dtype=torch.float64, generator=g) + 1
    weight, true = (torch.randn(3, 6, dtype=torch.float64, generator=g) for _ in range(2))
    y = x @ true.mT + 2.0 * bias
    got = ridge(moments(x, y), 0, weight, bias=bias, strength=1e-3)
    centre = x.mean(0) if bias else torch.zeros(6, dtype=torch.float64)
    second = (x - centre).mT @ (x - centre) / len(x)
    damping = 1e-3 * second.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = (true @ second + weight @ damping) @ torch.linalg.inv(second + damping)
    assert torch.allclose(got, expected, rtol=1e-2, atol=2e-3)
    assert (got - true).norm() < 0.01 * (weight - true).norm()


def test_a_gram_that_rounding_left_indefinite_is_solved_all_the_same() -> None:
    """Sums of products in float32 can leave a direction slightly below zero."""
    eye = torch.eye(4, dtype=torch.float64)
    own = moments(torch.zeros(0, 4), torch.zeros(0, 2))
    own.count = 100_000
    spectrum = torch.tensor([4.0, 1e-3, 1e-3, -0.5], dtype=torch.float64)
    own.xx = (eye * spectrum * own.count)[None]
    own.yx = torch.randn(1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * own.count
    got = ridge(own, 0, torch.zeros(2, 4, dtype=torch.float64), bias=False, strength=1e-3)
    assert bool(torch.isfinite(got).all())
    kept = own.yx[0] / own.count / (spectrum + 1e-3 * spectrum.mean())
    assert torch.allclose(got[:, [0, 3]], kept[:, [0, 3]], rtol=1e-2)

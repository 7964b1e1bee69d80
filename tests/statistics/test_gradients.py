"""The gradient Gram against the Jacobian itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import collect_gradients


def _collected(model: nn.Module, x: Tensor, samples: int) -> tuple[rf.Statistics, str | None]:
    sites = rf.find_sites(model, x)
    stats = collect(model, [x], sites=sites)
    return stats, collect_gradients(model, [x], stats, sites=sites, samples=samples)


def test_the_gram_is_the_mean_of_jacobian_products() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).eval()
    x = torch.randn(6000, 5, generator=generator)
    stats, why = _collected(model, x, samples=6000)
    assert why is None
    second = model.get_submodule("1").get_parameter("weight").detach().double()
    centre = torch.eye(3).double() - 1 / 3  # logits: a shift of all of them changes nothing
    expected = second.T @ centre @ second
    got = stats.sites["0"]["gradient-gram"].mean()[0]
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


def test_positions_of_a_sample_are_summed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    stats, _ = _collected(model, x, samples=8)
    gram = stats.sites["0"]["gradient-gram"]
    assert gram.count == 8
    assert gram.mean().shape == (1, 3, 3)


def test_frozen_weights_and_in_place_operators_are_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)).eval().requires_grad_(False)
    stats, why = _collected(model, torch.randn(16, 6), samples=16)
    assert why is None
    assert float(stats.sites["0"]["gradient-gram"].mean()[0].trace()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_cannot_be_differentiated_says_why() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.layer(x).detach()  # type: ignore[no-any-return]

    model = Cut().eval()
    stats, why = _collected(model, torch.randn(16, 8), samples=16)
    assert why is not None
    assert "gradient-gram" not in stats.sites["layer"]
    out = rf.compress(model, [torch.randn(20, 8)], budget=rf.Budget(params=0.8))
    assert any("not weighted" in note for note in out.report.notes)


def test_weighting_changes_the_plan() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model.get_submodule("2").get_parameter("weight").mul_(0.01)
    x = torch.randn(200, 32, generator=generator)
    plans = [
        rf.compress(
            model, [x], budget=rf.Budget(params=0.6), weighting=flag, repair=None, selector=rf.Lagrangian()
        ).plan
        for flag in (True, False)
    ]
    assert plans[0].decisions != plans[1].decisions


@pytest.mark.parametrize("family", [rf.WhitenedSVD(), rf.WhitenedSVD(mirrored=True), rf.SpatialSVD(), rf.Tucker2()])
def test_weighted_factors_lower_the_weighted_error(family: rf.Decomposition) -> None:
    from rankfold.decompositions import Moments, factorise

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator).double()
    root = torch.randn(45, 45, generator=generator).double()
    output = torch.diag(torch.tensor([100.0, 30.0, 10.0, 1.0, 0.1, 0.01])).double()
    rank = (2, 2) if isinstance(family, rf.Tucker2) else 2

    def error(gradient: Tensor | None) -> float:
        moments = Moments(root @ root.T, None, None, False, gradient)
        lost = (weight - factorise(family, weight, rank, moments).reconstruct()).flatten(1)
        return float(torch.trace(output @ lost @ (root @ root.T) @ lost.T))

    assert error(output) < error(None)

"""The gradient Gram against the Jacobian itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.outputs.taken import settled
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import collect_gradients


def _collected(model: nn.Module, x: Tensor, samples: int) -> tuple[rf.Statistics, str | None]:
    sites = rf.find_sites(model, x)
    stats = collect(model, [x], sites=sites)
    return stats, collect_gradients(model, [x], stats, sites=sites, samples=samples)


class Named(nn.Sequential):
    """Returns its output under a name."""

    name = "logits"

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {self.name: super().forward(x)}


@pytest.mark.parametrize("name", ["logits", "values"])
def test_the_gram_is_the_mean_of_jacobian_products(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Named(nn.Linear(5, 4), nn.Linear(4, 3)).eval()
    model.name = name
    x = torch.randn(6000, 5, generator=generator)
    stats, why = _collected(model, x, samples=6000)
    assert why is None
    second = model.get_submodule("1").get_parameter("weight").detach().double()
    centre = torch.eye(3).double() - (1 / 3 if name == "logits" else 0)  # a shift of all logits changes nothing
    expected = second.T @ centre @ second
    got = stats.sites["0"]["gradient-gram"].mean()[0]
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("columns", "shift", "expected"),
    [(2, 1.0, False), (2, 0.05, True), (5, 1.0, False), (200, 1.0, True), (1, 0, False)],
)
def test_outputs_that_shift_together_are_no_logits(columns: int, shift: float, expected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(40, columns, generator=generator)
    own = own - own.mean(1, keepdim=True) * (1 - shift)
    assert settled(nn.Identity(), [own[:20], own[20:]]).kinds == {"output": rf.Logits() if expected else rf.Values()}


class TwoHeads(nn.Module):
    """Two equal heads, the second in another unit; or before an arg-max."""

    def __init__(self, unit: float, *, cut: bool = False) -> None:
        super().__init__()
        self.i, self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.oa, self.ob = nn.Linear(24, 4), nn.Linear(24, 4)
        self.b.load_state_dict(self.a.state_dict())
        self.ob.load_state_dict(self.oa.state_dict())
        self.unit, self.cut = unit, cut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.i(x).relu()
        first, second = self.oa(self.a(h).relu()), self.ob(self.b(h).relu())
        return first, (second > 0).to(x.dtype) if self.cut else second * self.unit


@pytest.mark.parametrize("unit", [0.01, 1.0, 100.0])
def test_all_outputs_weigh_alike_in_whatever_unit(unit: float) -> None:
    torch.manual_seed(0)
    model = TwoHeads(unit).eval()
    stats, _ = _collected(model, torch.randn(400, 12), samples=400)
    first, second = (float(stats.sites[path]["gradient-gram"].mean().norm()) for path in "ab")
    assert first == pytest.approx(second, rel=0.2)
    assert "unreached" not in stats.manifest


def test_a_site_without_a_gradient_weighs_as_the_others_do() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(1.0, cut=True).eval(), torch.randn(200, 12)
    stats, why = _collected(model, x, samples=200)
    assert why is None
    assert stats.manifest["unreached"] == ["b", "ob"]
    first, second = (float(stats.sites[path]["gradient-gram"].mean()[0].trace()) for path in "ab")
    assert 0.02 < first / second < 50  # of another layer the identity would be thousands away
    out = rf.compress(model, [x], budget=rf.Budget(params=0.6))
    assert any("no gradient of the outputs reaches b, ob" in note for note in out.report.notes)
    assert len(out.report.comparison.outputs) == 2  # type: ignore[union-attr]


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

"""How far a repair follows the original's outputs: laws of the anchor, against targets that are mixed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.decompositions import factorise
from rankfold.registry import from_json, to_json
from rankfold.repair.lockstep import Repaired, lockstep_pass
from rankfold.repair.moments import SplitMoments
from rankfold.repair.solve import as_moments, best_bias, mean_target, ridge
from rankfold.sites.finding import find_sites
from rankfold.statistics.collect import collect

EVERY = 10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor, y: Tensor) -> SplitMoments:
    """Of one group; every other row is of the first half."""
    result = SplitMoments.zeros(1, x.shape[1], y.shape[1], torch.device("cpu"))
    result.first.update(x[None, ::2], y[None, ::2])
    result.second.update(x[None, 1::2], y[None, 1::2])
    return result


@pytest.mark.parametrize("anchor", [1e-6, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_an_anchor_is_the_repair_of_the_mixed_target(anchor: float, bias: bool, noise: float) -> None:
    x, weight, shift = drawn(80, 12) + 1, drawn(5, 12, seed=1), drawn(5, seed=2)
    y = x @ (weight + 0.3 * drawn(5, 12, seed=3)).mT + noise * drawn(80, 5, seed=4)
    own = x @ weight.mT + (shift if bias else 0)
    options: dict[str, Any] = {"bias": bias, "strength": 1e-3}
    expected, level = ridge(moments(x, anchor * y + (1 - anchor) * own), 0, weight, **options)
    seen = moments(x, y)
    got, same = ridge(seen, 0, weight, anchor=anchor, **options)
    assert same == level
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    mean = mean_target(seen.fit, 0, weight, shift if bias else None, anchor)
    assert torch.allclose(mean, (anchor * y + (1 - anchor) * own).mean(0), rtol=1e-9)


def test_the_whole_anchor_has_the_bits_of_no_anchor() -> None:
    x, weight, shift = drawn(80, 12) + 1, drawn(5, 12, seed=1), drawn(5, seed=2)
    y = x @ drawn(5, 12, seed=3).mT
    fit = moments(x, y).fit
    assert torch.equal(mean_target(fit, 0, weight, shift, 1.0), fit.y[0] / fit.count)
    mean = mean_target(fit, 0, weight, shift, 1.0)
    assert torch.equal(best_bias(fit, 0, weight, mean), fit.y[0] / 80 - weight @ (fit.x[0] / 80))


class Body(nn.Module):
    """A layer that loses rank, and a site behind it that stays dense."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.cut = nn.Conv2d(3, 8, 3, padding=1)
        self.site = nn.Conv2d(8, 8, 3, padding=1, groups=2 if kind == "groups" else 1, bias="bias" in kind)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The site in the place that its kind says."""
        x = F.relu(self.cut(x))
        if self.kind == "norm":
            x = self.norm(self.site(x))
        elif "skip" in self.kind:
            x = x + self.norm(self.site(x))
        elif self.kind == "shared":
            x = self.site(F.relu(self.site(x)))
        else:
            x = self.site(x)
        out: Tensor = self.head(F.relu(x).mean((2, 3)))
        return out


def network(kind: str) -> Body:
    torch.manual_seed(0)
    model = Body(kind)
    with torch.no_grad():
        for name, tensor in model.norm.state_dict().items():
            if name != "num_batches_tracked":
                tensor.uniform_(0.5, 1.5)
    return model.eval()


IMAGES = F.interpolate(torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=8, mode="bilinear")


def repaired(model: nn.Module, *decisions: rf.Decision, **options: Any) -> Repaired:
    """A lockstep pass on the outputs themselves in which all sites without a decision stay dense."""
    sites = find_sites(model, IMAGES[:8])
    own = {decision.site: decision for decision in decisions}
    plan = rf.Plan(tuple(own.get(site.path, rf.Decision(site.path)) for site in sites), sites.skips, sites.fingerprint)
    stats = collect(model, [IMAGES], sites=sites)
    return lockstep_pass(
        model, sites, plan, [IMAGES], options=rf.Lockstep(activation=0, **options), stats=stats, every=EVERY
    )


@pytest.mark.parametrize("kind", ["plain", "bias", "groups", "norm", "skip", "skip and bias", "shared"])
def test_a_dense_site_goes_from_its_own_weight_to_the_repaired_one_in_a_straight_line(kind: str) -> None:
    model = network(kind)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    cut = rf.Decision("cut", rf.SVD(), 3)
    ends = repaired(model, cut)
    assert "site" not in ends.unrepaired
    whole = dict(ends.layers["site"].named_parameters())
    for anchor in (0.25, 0.5):
        seen = repaired(model, cut, anchor=anchor)
        assert "site" not in seen.unrepaired
        for name, value in seen.layers["site"].named_parameters():
            expected = torch.lerp(before[f"site.{name}"], whole[name], anchor)
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, before[f"site.{name}"])
        assert set(seen.buffers) == set(ends.buffers) == ({"norm.running_mean"} if kind in ("norm", "skip") else set())
        for name, mean in seen.buffers.items():
            assert torch.allclose(mean, torch.lerp(before[name], ends.buffers[name], anchor), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_vanishing_anchor_factorises_the_weight_itself_in_the_metric_of_the_compressed_inputs(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankfold.repair.site.doubt", lambda samples: -1e9)  # taken, whether it helps or not
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12, bias=bias), nn.ReLU(), nn.Linear(12, 4)).eval()
    x = torch.randn(400, 16) * torch.logspace(-1, 1, 16) + 1
    sites = find_sites(model, x)
    decisions = (rf.Decision("0", rf.SVD(), 4), rf.Decision("1", rf.WhitenedSVD(), 3), rf.Decision("3"))
    plan = rf.Plan(decisions, sites.skips, sites.fingerprint)
    stats = collect(model, [x], sites=sites)
    seen = lockstep_pass(
        model, sites, plan, [x], options=rf.Lockstep(anchor=1e-12, activation=0), stats=stats, every=EVERY
    )
    assert "1" not in seen.unrepaired
    with torch.no_grad():
        inputs = seen.layers["0"](x)[torch.arange(400) % EVERY != EVERY - 1].double()
    weight = model[1].weight.detach().double()  # type: ignore[union-attr, operator]
    rows = torch.arange(400)[torch.arange(400) % EVERY != EVERY - 1]
    own = SplitMoments.zeros(1, 16, 12, inputs.device)
    for part, half in ((own.first, rows % 2 == 0), (own.second, rows % 2 == 1)):
        part.update(inputs[None, half], (inputs @ weight.mT)[None, half])
    expected = factorise(rf.WhitenedSVD(), weight, 3, as_moments(own, 0, bias=bias, gradient_gram=None)).reconstruct()
    first, last = seen.layers["1"].children()
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert torch.allclose((last.weight @ first.weight).double(), expected, rtol=1e-4, atol=1e-5)
    if bias:
        shift = model[1].bias.detach().double() + (weight - expected) @ inputs.mean(0)  # type: ignore[union-attr, operator]
        assert torch.allclose(last.bias.double(), shift, rtol=1e-4, atol=1e-4)


def test_plans_from_before_the_anchor_keep_their_bytes_and_are_read() -> None:
    assert "anchor" not in to_json(rf.Lockstep())
    old = from_json({"name": "lockstep", "ridge": 0.01}, rf.Lockstep, place="plan.repair")
    assert old == rf.Lockstep(ridge=0.01, activation=0)
    model = network("plain")
    out = rf.compress(
        model, [IMAGES], budget=rf.Budget(params=0.7), selector=rf.Uniform(), repair=rf.Lockstep(anchor=0.5)
    )
    assert json.loads(out.plan.to_json())["repair"]["anchor"] == 0.5
    again = rf.apply(model, rf.Plan.from_json(out.plan.to_json()), [IMAGES]).state_dict()
    assert all(torch.equal(again[name], value) for name, value in out.model.state_dict().items())
    whole = rf.apply(model, replace(out.plan, repair={"name": "lockstep", "activation": 2}), [IMAGES]).state_dict()
    assert not all(torch.equal(whole[name], value) for name, value in out.model.state_dict().items())

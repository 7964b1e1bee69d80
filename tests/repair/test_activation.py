"""Sites in front of an activation: which activation stands there, and laws of the targets seen past it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.distributed import ALONE
from rankfold.errors import OptionError
from rankfold.graph.activations import Activation, activation_behind
from rankfold.graph.regions import channel_scale
from rankfold.registry import from_json, to_json
from rankfold.repair.activation import LEAST, Past
from rankfold.repair.lockstep import Repaired, lockstep_pass
from rankfold.repair.moments import SplitMoments
from rankfold.sites.finding import find_sites
from rankfold.sites.site import Sites
from rankfold.statistics.collect import collect

IMAGES = F.interpolate(torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=8, mode="bilinear")


class Body(nn.Module):
    """Two layers and a head; `behind` is what stands behind the second."""

    def __init__(self, behind: Callable[[Body, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.behind = behind
        self.cut, self.site = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.scale, self.slope = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Parameter(torch.rand(8))
        for name, tensor in self.norm.state_dict().items():
            if name != "num_batches_tracked":
                tensor.uniform_(0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Head of what stands behind the site."""
        x = F.relu(self.cut(x))
        y: Tensor = self.head(self.behind(self, self.site(x), x).mean((2, 3)))
        return y


ALONE_BEHIND: dict[str, Callable[[Body, Tensor, Tensor], Tensor]] = {
    "relu": lambda m, y, x: F.relu(y),
    "relu in place": lambda m, y, x: F.relu_(y),
    "norm, relu6": lambda m, y, x: F.relu6(m.norm(y)),
    "norm, scale, gelu": lambda m, y, x: F.gelu(m.scale * m.norm(y), approximate="tanh"),
    "norm, add, relu": lambda m, y, x: F.relu(m.norm(y) + x),
    "norm, add turned round, dropout, silu": lambda m, y, x: F.silu(F.dropout(x + m.norm(y), 0.1, False)),
    "leaky relu": lambda m, y, x: F.leaky_relu(y, 0.3),
}
NONE_BEHIND: dict[str, Callable[[Body, Tensor, Tensor], Tensor]] = {
    "nothing": lambda m, y, x: m.norm(y),
    "two readers": lambda m, y, x: F.relu(m.norm(y)) + y,
    "the sum has two readers": lambda m, y, x: (s := m.norm(y) + x) + F.relu(s),
    "a slope that is a tensor": lambda m, y, x: F.prelu(y, m.slope),
    "two sums": lambda m, y, x: F.relu(y + x + x),
    "a norm behind the sum": lambda m, y, x: F.relu(m.norm(y + x)),
    "its own skip": lambda m, y, x: F.relu(y + y),
}


def behind(model: Body) -> tuple[Sites, Activation | None]:
    sites = find_sites(model, IMAGES[:8])
    return sites, activation_behind(next(call for call in sites.in_graph() if call.path == "site"), -3)


@pytest.mark.parametrize("kind", ALONE_BEHIND)
def test_the_activation_and_the_steps_before_it_compute_what_the_code_computes(kind: str) -> None:
    model = Body(ALONE_BEHIND[kind])
    sites, seen = behind(model)
    assert seen is not None
    assert seen.skip == ("add" in kind)
    y, x = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    program = sites.graph.program
    assert program is not None
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    factor, offset = seen.affine(y.shape, -3, lambda node: tensors[names[node.name]].detach())
    own = factor.float()[:, None, None] * y + offset.float()[:, None, None]
    with torch.no_grad():
        expected = model.behind(model, y.clone(), x)
    assert torch.allclose(seen.function(own + x if seen.skip else own), expected, rtol=1e-4, atol=1e-5)
    call = next(call for call in sites.in_graph() if call.path == "site")
    if seen.skip:
        scale = channel_scale(call, y.shape, lambda node: tensors[names[node.name]].detach())
        assert scale is not None
        assert torch.allclose(scale.flatten(), factor, rtol=1e-6)


@pytest.mark.parametrize("kind", NONE_BEHIND)
def test_a_layer_that_is_read_otherwise_too_has_no_activation_behind_it(kind: str) -> None:
    assert behind(Body(NONE_BEHIND[kind]))[1] is None


@pytest.mark.parametrize(("shape", "found"), [((8,), True), ((1, 1, 8), True), ((5, 8), False), ((5, 1), False)])
def test_a_scale_along_tokens_is_no_step_of_a_channel(shape: tuple[int, ...], found: bool) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.scale, self.head = nn.Linear(6, 8), nn.Parameter(torch.rand(shape)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(F.gelu(self.site(x) * self.scale))
            return y

    sites = find_sites(Tokens().eval(), torch.randn(3, 5, 6))
    call = next(call for call in sites.in_graph() if call.path == "site")
    assert (activation_behind(call, -1) is not None) == found


@pytest.mark.parametrize(("ndim", "found"), [(2, True), (3, False)])
def test_a_batch_norm_over_tokens_is_no_step_of_a_channel(ndim: int, found: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    sites = find_sites(model, torch.randn(3, *[8] * (ndim - 2), 6))
    assert (activation_behind(next(iter(sites.in_graph())), -1) is not None) == found


def past(function: str, x: Tensor, t: Tensor, *, factor: float = 1.0, offset: float = 0.0) -> tuple[Past, SplitMoments]:
    """Rows of one group, every other one of the first half."""
    graph = torch.fx.Graph()
    node = graph.call_function(getattr(torch.ops.aten, function).default, (graph.placeholder("x"),))
    seen = SplitMoments.zeros(1, x.shape[1], t.shape[1], x.device)
    labels = torch.arange(len(x)) % 2
    for label in (0, 1):
        seen.parts[label].update(x[None, labels == label], t[None, labels == label])

    def rows(only: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        yield labels, x[None], t[None], None

    a, c = (torch.full((1, 1, t.shape[1]), each, dtype=torch.float64) for each in (factor, offset))
    return Past(Activation((), False, node), a, c, rows, ALONE), seen


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("function", ["relu", "gelu", "silu", "hardtanh"])
@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_working_targets_have_the_squared_secant_slope_for_weight(function: str, factor: float) -> None:
    x, t, weight, bias = drawn(200, 6), drawn(200, 3, seed=1), drawn(1, 3, 6, seed=2), drawn(1, 1, 3, seed=3)
    seen_past, seen = past(function, x, t, factor=factor, offset=0.3)
    fitted = x @ weight[0].mT + bias[0]
    act = getattr(torch.ops.aten, function)
    before, after = factor * t + 0.3, factor * fitted + 0.3
    slope = (act(before) - act(after)) / (before - after)
    wanted = fitted + (slope**2).clamp(LEAST, 1) * (t - fitted)
    got = seen_past.moments(seen, (weight, bias))
    assert torch.allclose(got.fit.yx[0], wanted.mT @ x)
    assert torch.allclose(got.fit.y[0], wanted.sum(0))
    assert torch.allclose(got.fit.yy[0], wanted.square().sum())
    assert torch.equal(got.fit.xx, seen.fit.xx)
    (error,) = seen_past.errors(seen, [(weight, bias)])
    assert error == pytest.approx(float((act(before) - act(after)).square().sum() / act(before).square().sum()))


def test_working_targets_are_the_targets_where_a_relu_lets_all_through() -> None:
    x, t = drawn(50, 4), drawn(50, 2, seed=1).abs() + 10
    seen_past, seen = past("relu", x, t)
    got = seen_past.moments(seen, (torch.zeros(1, 2, 4, dtype=torch.float64), torch.full((1, 1, 2), 5.0).double()))
    assert torch.allclose(got.fit.yx, seen.fit.yx)


def test_fits_to_working_targets_lower_the_error_past_a_relu() -> None:
    x = drawn(4000, 12)
    t = x @ drawn(4, 12, seed=1).mT + 2 * (x[:, :4] * x[:, 4:8])  # no linear map of x gives it
    seen_past, seen = past("relu", x, t)
    errors = []
    moments = seen
    for _ in range(4):
        mean_x, mean_t = moments.fit.x[0] / 4000, moments.fit.y[0] / 4000
        second = moments.fit.xx[0] / 4000 - torch.outer(mean_x, mean_x)
        weight = (moments.fit.yx[0] / 4000 - torch.outer(mean_t, mean_x)) @ torch.linalg.inv(second)
        affine = weight[None], (mean_t - weight @ mean_x)[None, None]
        errors += seen_past.errors(seen, [affine])
        moments = seen_past.moments(seen, affine)
    assert errors[1] < 0.99 * errors[0]
    assert errors == sorted(errors, reverse=True)


def repaired(model: nn.Module, **options: Any) -> Repaired:
    sites = find_sites(model, IMAGES[:8])
    own = {"cut": rf.Decision("cut", rf.SVD(), 3), "site": rf.Decision("site", rf.SVD(), 3)}
    plan = rf.Plan(tuple(own.get(site.path, rf.Decision(site.path)) for site in sites), sites.skips, sites.fingerprint)
    stats = collect(model, [IMAGES], sites=sites)
    return lockstep_pass(model, sites, plan, [IMAGES], options=rf.Lockstep(**options), stats=stats, every=10)


@pytest.mark.parametrize("kind", ["relu", "norm, relu6", "norm, add, relu", "norm, scale, gelu"])
def test_a_repair_past_the_activation_is_no_worse_there_on_held_out_samples(kind: str) -> None:
    model = Body(ALONE_BEHIND[kind])
    held = torch.arange(200) % 10 == 9
    with torch.no_grad():
        inner = F.relu(model.cut(IMAGES))
        expected = model.behind(model, model.site(inner), inner)[held]
        errors = {}
        for times in (0, 2):
            seen = repaired(model, activation=times)
            assert "site" not in seen.unrepaired
            mean = model.norm.running_mean
            model.norm.running_mean = seen.buffers.get("norm.running_mean", mean)
            x = F.relu(seen.layers["cut"](IMAGES))
            got = model.behind(model, seen.layers["site"](x), x)[held]
            model.norm.running_mean = mean
            errors[times] = float((got - expected).square().sum() / expected.square().sum())
            if times:
                assert seen.errors["site"][1] == pytest.approx(errors[times], rel=1e-3)
    assert errors[2] <= errors[0] * 1.02  # each has the inputs that its own first layer gives it
    if kind == "relu":
        assert errors[2] < errors[0]


def test_what_a_skip_branch_masks_with_infinity_costs_nothing() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.f, self.o = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            off = torch.zeros_like(x).masked_fill(x > 1.5, float("-inf")).repeat(1, 2)
            y: Tensor = self.o(torch.sigmoid(self.f(F.gelu(self.a(x))) + off))
            return y

    torch.manual_seed(0)
    model, x = Gate().eval(), torch.randn(60, 12)
    out = rf.compress(model, x, budget=rf.Budget(params=0.5), selector=rf.Lagrangian())
    assert torch.isfinite(out.model(x)).all()


@pytest.mark.parametrize("masked", [-math.inf, math.inf])
def test_outputs_past_infinity_are_no_error(masked: float) -> None:
    x, t = drawn(50, 4), drawn(50, 2, seed=1)
    seen_past, seen = past("relu", x, t)
    skip = torch.zeros(1, 50, 2, dtype=torch.float64)
    skip[0, :10] = masked
    rows = next(seen_past.rows(None))
    hidden = replace(seen_past, rows=lambda only: iter([(*rows[:3], skip)]))
    affine = drawn(1, 2, 4, seed=2), torch.zeros(1, 1, 2, dtype=torch.float64)
    (error,) = hidden.errors(seen, [affine])
    assert math.isfinite(error)
    assert bool(torch.isfinite(hidden.moments(seen, affine).fit.yx).all())


def test_plans_from_before_are_read_as_what_they_were() -> None:
    assert to_json(rf.Lockstep())["activation"] == 2
    assert "activation" not in to_json(rf.Lockstep(activation=0))
    assert from_json({"name": "lockstep"}, rf.Lockstep, place="plan.repair") == rf.Lockstep(activation=0)


def test_nothing_changes_where_no_activation_follows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 4)).eval()
    x = torch.randn(200, 16)
    made = [
        rf.compress(model, x, budget=rf.Budget(params=0.6), repair=rf.Lockstep(activation=times)).model.state_dict()
        for times in (0, 2)
    ]
    assert all(torch.equal(made[0][name], value) for name, value in made[1].items())


@pytest.mark.parametrize("times", [-1, 1.5, True, False, 0.0, "2", None])
def test_the_number_of_fits_is_a_whole_number(times: Any) -> None:
    with pytest.raises(OptionError, match=r"Lockstep\.activation"):
        rf.Lockstep(activation=times)

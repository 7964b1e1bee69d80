"""Laws of the lockstep repair, on small networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.errors import OptionError, PlanError, SelfCheckError
from rankfold.repair.gather import Share
from rankfold.repair.lockstep import install, lockstep_pass, self_check
from rankfold.repair.moments import FIRST, HELD, SECOND
from rankfold.sites.finding import find_sites
from rankfold.statistics.collect import collect


class Block(nn.Module):
    """Two convolutions with batch norms and a parameter-free skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A stem, residual blocks, a strided grouped convolution, and a head."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(self.blocks(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """A transformer-like block on sequences: layer norm, MLP, residual; keyword input."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 7)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return {"logits": self.head(x)}


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch-norm statistics drawn by a seed, without the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point() and value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
    return model.eval()


def images(count: int = 60, size: int = 8, seed: int = 1) -> list[Tensor]:
    """Smooth images: neighbouring pixels are alike, so that low ranks make sense."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 2, size // 2, generator=generator)
    return list(F.interpolate(coarse, size=size, mode="bilinear").split(20))


def error(model: nn.Module, other: nn.Module, batches: Iterable[Tensor]) -> float:
    return rf.compare(model, other, batches).relative_error


def test_a_plan_that_leaves_everything_dense_changes_no_output() -> None:
    model, data = seeded(Net()), images()
    out = rf.compress(model, data, budget=rf.Budget(params=1.0))
    assert error(model, out.model, data) < 1e-8


def test_repair_lowers_the_error_on_inputs_it_never_saw() -> None:
    model, data, fresh = seeded(Net()), images(200), images(60, seed=7)
    budget = rf.Budget(params=0.55)
    plain = rf.compress(model, data, budget=budget, repair=None)
    repaired = rf.compress(model, data, budget=budget)
    assert error(model, repaired.model, fresh) < error(model, plain.model, fresh)


@pytest.mark.parametrize("family", [rf.SVD(), rf.WhitenedSVD(), rf.SpatialSVD(), rf.Tucker2()])
def test_every_family_goes_through_lockstep_within_the_budget(family: rf.Decomposition) -> None:
    model, data = seeded(Net()), images()
    budget = rf.Budget(params=0.8)
    out = rf.compress(model, data, budget=budget, families=[family])
    assert count(out.model, data[0]).params <= int(0.8 * count(model, data[0]).params)
    assert out.report.after == rf.plan_cost(find_sites(model, data[0]), out.plan)


def test_sequences_by_keyword_go_through_lockstep() -> None:
    model = seeded(Encoder())
    data = [{"tokens": torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    out = rf.compress(model, data, budget=rf.Budget(params=0.7), selector=rf.Lagrangian())
    assert any("self-check" in note for note in out.report.details)
    assert any(decision.method is not None for decision in out.plan.decisions)


def test_a_layer_without_bias_gets_none_and_the_norm_takes_the_shift() -> None:
    model, data = seeded(Net()), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), selector=rf.Lagrangian(), families=[rf.WhitenedSVD()])
    factors = [name for name, _ in out.model.named_parameters() if ".conv" in name]
    assert any(decision.method is not None and ".conv" in decision.site for decision in out.plan.decisions)
    assert [name for name in factors if name.endswith("bias")] == []
    before = dict(model.named_buffers())
    moved = [
        name
        for name, value in out.model.named_buffers()
        if name.endswith("running_mean") and not torch.equal(value, before[name])
    ]
    assert moved


def test_the_original_is_left_untouched() -> None:
    model, data = seeded(Net()), images()
    before = copy.deepcopy(model.state_dict())
    rf.compress(model, data, budget=rf.Budget(params=0.6))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_bits() -> None:
    model, data = seeded(Net()), images()
    first, second = (rf.compress(model, data, budget=rf.Budget(params=0.6), seed=3).model for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_apply_of_the_plan_gives_the_bits_of_compress() -> None:
    model, data = seeded(Net()), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6))
    again = rf.apply(model, rf.Plan.from_json(out.plan.to_json()), data)
    for name, value in out.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_save_and_load_keep_the_bits(tmp_path: object) -> None:
    model, data = seeded(Net()), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6))
    rf.save(out, f"{tmp_path}/small")
    loaded = rf.load(f"{tmp_path}/small", factory=Net)
    assert torch.equal(out.model(data[0]), loaded(data[0]))


def test_a_module_that_computes_something_else_fails_the_self_check() -> None:
    model, data = seeded(Net()), images()
    sites = find_sites(model, data[0])
    stats = collect(model, data, sites=sites)
    plan = rf.make_plan(rf.measure(model, stats, sites=sites), budget=rf.Budget(params=0.6))
    repaired = lockstep_pass(model, sites, plan, data, options=rf.Lockstep(), stats=stats, every=10)
    result = install(copy.deepcopy(model), repaired)
    assert self_check(result, repaired) <= 1e-4
    with torch.no_grad():
        next(result.parameters()).add_(1.0)
    with pytest.raises(SelfCheckError, match="relative difference"):
        self_check(result, repaired)


def test_a_layer_is_never_worse_on_held_out_samples_than_without_its_repair() -> None:
    """The first layer loses `b` of `(a, b)`. Fitted samples have `b = a`, held-out ones `b = −a`: what least squares
    learns of `b` from `a` doubles the error where it was not fitted.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(400, 4, generator=generator)
    held = torch.arange(400) % 10 == 9
    x = torch.cat([half, torch.where(held[:, None], -half, half)], 1)
    model = seeded(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0] * 4 + [1.0] * 4)))
    sites = find_sites(model, x)
    plan = rf.Plan(
        (rf.Decision("0", rf.SVD(), 4), rf.Decision("1")), sites.skips, sites.fingerprint, repair={"name": "lockstep"}
    )
    stats = collect(model, [x], sites=sites)
    repaired = lockstep_pass(model, sites, plan, [x], options=rf.Lockstep(), stats=stats, every=10)
    assert torch.equal(torch.cat([each.cpu() for each in repaired.held]), held)

    with torch.no_grad():
        seen, target = repaired.layers["0"](x).double(), model(x).double()
        returned = repaired.layers.get("1", model[1])(seen.float()).double()  # type: ignore[misc]
        unrepaired = model[1](seen.float()).double()
    columns = torch.cat([seen, torch.ones(400, 1, dtype=torch.float64)], 1)
    fitted = columns @ torch.linalg.lstsq(columns[~held], target[~held], driver="gelsd").solution

    def missed(outputs: Tensor, rows: Tensor) -> float:
        return float((outputs - target)[rows].square().sum())

    assert missed(fitted, ~held) < 0.01 * missed(unrepaired, ~held)  # worth it where it was fitted,
    assert missed(fitted, held) > 2 * missed(unrepaired, held)  # and harmful where it was not
    assert missed(returned, held) <= missed(unrepaired, held) * (1 + 1e-6)


class Twice(nn.Module):
    """One layer in two places whose inputs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.stem(x))
        second = torch.sigmoid(self.shared(first)) * 4 - 2
        return self.head(self.shared(second[:, torch.arange(15, -1, -1)]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_called_twice_is_solved_and_judged_on_both_calls(seed: int) -> None:
    """The repaired layer is better over all its calls than the unrepaired one, on inputs it never saw."""
    model = seeded(Twice(), seed)
    x, fresh = images(300, 12, seed=3)[0], images(300, 12, seed=9)[0]
    x, fresh = (each.flatten(1)[:, :12] for each in (x, fresh))
    options: dict[str, Any] = {
        "budget": rf.Budget(params=0.8),
        "families": [rf.WhitenedSVD()],
        "selector": rf.Uniform(),
        "only": ["shared"],
    }
    calls: list[Tensor] = []
    handle = model.shared.register_forward_pre_hook(lambda _layer, args: calls.append(args[0]))
    with torch.no_grad():
        model(fresh)
    handle.remove()
    assert len(calls) == 2
    inputs = torch.cat(calls)

    def missed(repair: rf.Lockstep | None) -> float:
        small = rf.compress(model, [x], repair=repair, **options).model
        with torch.no_grad():
            return float((small.shared(inputs) - model.shared(inputs)).square().sum())

    assert missed(rf.Lockstep()) <= missed(None) * 1.02


def test_absorbing_the_skip_lowers_the_error_of_a_deep_residual_network() -> None:
    model, data, fresh = seeded(Net(blocks=6)), images(200), images(60, seed=7)
    budget = rf.Budget(params=0.3)  # errors that are worth absorbing
    session = rf.prepare(model, data, families=[rf.WhitenedSVD(), rf.SpatialSVD()])
    assert session.proposers  # collects the statistics
    curves = rf.measure(model, session.stats, sites=session.sites, families=[rf.WhitenedSVD(), rf.SpatialSVD()])

    def loss(absorb: bool) -> float:
        options = rf.Lockstep(absorb_skip=absorb)
        plan = rf.make_plan(curves, budget=budget, calibration=session.stats.manifest, repair=options)
        return error(model, session.trials.attempt(plan).model, fresh)

    assert loss(True) < loss(False)


def test_a_model_without_a_graph_says_that_there_was_no_repair() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y * 2 if bool(y.sum() > 0) else y

    out = rf.compress(seeded(Branching()), [torch.rand(12, 16)], budget=rf.Budget(params=0.6))
    assert any("no lockstep repair" in note for note in out.report.notes)
    assert out.plan.repair is None


@pytest.mark.parametrize(
    "options",
    [
        {"ridge": 0.0},
        {"ridge": 2.0},
        {"batch": 0},
        {"absorb_skip": 1},
        {"samples_per_feature": 1.5},
        {"anchor": 0},
        {"anchor": -0.5},
        {"anchor": 1.01},
        {"anchor": True},
        {"anchor": float("nan")},
    ],
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="Lockstep"):
        rf.Lockstep(**options)  # type: ignore[arg-type]


def test_a_plan_with_an_unknown_repair_option_is_refused() -> None:
    model, data = seeded(Net()), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6))
    text = out.plan.to_json().replace('"absorb_skip"', '"absorb_skips"')
    with pytest.raises(PlanError, match="absorb_skip"):
        rf.apply(model, rf.Plan.from_json(text), data)


def test_with_time_in_front_no_step_passes_for_a_held_out_sample() -> None:
    """Ten steps of ten samples: rows are steps, so none of them is a sample that nothing was fitted on."""
    share = Share([torch.zeros(10, 10, 6)], [torch.arange(10) % 10 == 9], [0], [0], 10, 1)
    own = share.labels_of(0, 10, (1,)).tolist()
    assert own == [FIRST, SECOND] * 4 + [FIRST, HELD]
    assert set(share.labels_of(0, 10, (10,)).tolist()) <= {FIRST, SECOND}
    assert share.labels_of(0, 20, (2,)).tolist() == [
        each for each in share.labels_of(0, 10, (1,)).tolist() for _ in "ab"
    ]

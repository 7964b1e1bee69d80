"""Models that draw, count, write into their inputs, keep functions or branch: compressed, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import DataError, ModelError, PlanError, SelfCheckError

BUDGET = rf.Budget(params=0.7)


class Flat(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.relu(self.a(x)))
        return y


class Drawing(Flat):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.relu(self.a(x)) + 0.01 * torch.randn(len(x), 64))
        return y


class Dropping(Flat):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.dropout(F.relu(self.a(x)), 0.1, self.training))
        return y


class Counting(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[assignment]
        self.last = x.detach().mean().reshape(1)
        return super().forward(x)


class Overwriting(Flat):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x)


class Shared(nn.Module):
    """One layer under four names, called through all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(32, 48), nn.Linear(48, 10)
        self.steps = nn.ModuleList([nn.Linear(48, 48)] * 3)
        self.last = self.steps[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for step in self.steps:
            x = x + torch.tanh(step(x))
        y: Tensor = self.head(self.last(x))
        return y


class Closure(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.first: Callable[[Tensor], Tensor] = lambda x: F.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.first(x))
        return y


class Forgetful(Flat):
    def __deepcopy__(self, memo: dict[int, Any]) -> Forgetful:
        return Forgetful()


class Branching(nn.Module):
    """A layer that only batches of more than four samples reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.shape[0] > 4:
            x = F.relu(self.b(x))
        y: Tensor = self.c(x)
        return y


def made(kind: type[nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return kind(), [torch.randn(16, 32) for _ in range(4)]


@pytest.mark.parametrize("repair", [rf.Lockstep(), None], ids=["lockstep", "no repair"])
@pytest.mark.parametrize("kind", [Drawing, Dropping, Counting, Overwriting, Shared])
def test_it_is_compressed_and_nothing_of_the_callers_changes(kind: type[nn.Module], repair: rf.Lockstep | None) -> None:
    model, data = made(kind)
    weights, inputs = copy.deepcopy(model.state_dict()), copy.deepcopy(data)
    out = rf.compress(model, data, budget=BUDGET, repair=repair)
    assert out.report.after.params <= 0.7 * out.report.before.params
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(now, before) for now, before in zip(data, inputs, strict=True))


def test_a_model_that_writes_into_its_input_equals_itself() -> None:
    model, data = made(Overwriting)
    assert rf.compare(model, model, data).relative_error == 0


def test_a_model_that_draws_has_no_lockstep_repair_and_the_report_says_why() -> None:
    model, data = made(Drawing)
    notes = rf.compress(model, data, budget=BUDGET).report.notes
    assert any("draws random numbers in eval mode (aten.randn" in note for note in notes)
    model, data = made(Dropping)
    assert not any("draws" in note for note in rf.compress(model, data, budget=BUDGET).report.notes)


@pytest.mark.parametrize(("kind", "said"), [(Closure, "calls 'a' of the original"), (Forgetful, "another 'a.weight'")])
def test_a_copy_that_is_no_model_of_its_own_is_refused(kind: type[nn.Module], said: str) -> None:
    model, data = made(kind)
    with pytest.raises(ModelError, match=said):
        rf.compress(model, data, budget=BUDGET)
    plan = rf.make_plan(
        rf.measure(
            model, rf.collect(model, data, sites=rf.find_sites(model, data[0])), sites=rf.find_sites(model, data[0])
        ),
        budget=BUDGET,
    )
    with pytest.raises(ModelError, match=said):
        rf.apply(model, plan, data)
    rf.apply_(model, plan, data)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2762


def test_a_layer_that_only_batches_reach_is_left_and_said() -> None:
    model, data = made(Branching)
    out = rf.compress(model, data, budget=rf.Budget(params=0.9))
    assert [skip.path for skip in out.plan.skips if "the whole batch does" in skip.reason] == ["b"]
    assert any("the whole batch does" in note and note.endswith(": b") for note in out.report.notes)


def test_in_place_a_failed_self_check_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(Flat)
    plan = rf.compress(model, data, budget=BUDGET).plan

    def failing(*_: Any) -> float:
        raise SelfCheckError("Flat", law="the same", got="another", cure="none")

    monkeypatch.setattr("rankfold.applying.self_check", failing)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(SelfCheckError):
        rf.apply_(model, plan, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]


def test_weights_made_in_inference_mode_can_be_compressed() -> None:
    with torch.inference_mode():
        model = Flat()
    out = rf.compress(model, [torch.randn(16, 32) for _ in range(2)], budget=BUDGET)
    assert out.report.after.params <= 0.7 * out.report.before.params


def test_what_is_no_plan_or_no_statistics_is_refused() -> None:
    model, data = made(Flat)
    plan: Any = "plan.json"
    with pytest.raises(PlanError, match=r"Plan\.from_json"):
        rf.apply(model, plan, data)
    made_plan, stats = rf.compress(model, data, budget=BUDGET, repair=None).plan, cast(Any, 3)
    with pytest.raises(DataError, match="what collect gave"):
        rf.apply(model, made_plan, data, stats=stats)


class Named(nn.Module):
    """Every layer is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(input=self.a(input=x)))
        y: Tensor = self.head(input=F.relu(self.b(input=x)).mean((2, 3)))
        return y


class Positional(Named):
    """The same, called as usual."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        y: Tensor = self.head(F.relu(self.b(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize("repair", [None, rf.Lockstep()], ids=["without repair", "with repair"])
@pytest.mark.parametrize("families", [[rf.WhitenedSVD()], [rf.Interpolative()]], ids=["ranks", "channels"])
def test_layers_called_by_keyword_are_compressed_as_those_called_by_position(
    families: list[rf.Family], repair: rf.Lockstep | None
) -> None:
    torch.manual_seed(0)
    named = Named().eval()
    positional = Positional().eval()
    positional.load_state_dict(named.state_dict())
    x = torch.randn(40, 3, 8, 8)
    first, second = (
        rf.compress(model, [x], budget=BUDGET, families=families, repair=repair) for model in (named, positional)
    )
    assert first.plan.decisions == second.plan.decisions
    assert first.plan.cuts == second.plan.cuts
    assert first.plan.changes or first.plan.cuts
    assert torch.equal(first.model(x), second.model(x))


def test_norms_called_by_keyword_are_estimated_as_those_called_by_position() -> None:
    torch.manual_seed(0)
    named = Named().eval()
    positional = Positional().eval()
    positional.load_state_dict(named.state_dict())
    x = torch.randn(40, 3, 8, 8)
    assert rf.reestimate_batch_norms(named, [x]) == rf.reestimate_batch_norms(positional, [x]) == ["norm"]
    assert torch.equal(named(x), positional(x))

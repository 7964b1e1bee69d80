"""Which models are taken: compiled ones as the plain one behind them, packed ones not at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import ModelError

BUDGET = rf.Budget(params=0.7)
compiles: list[str] = []


def _noting(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
    """A compiler that compiles nothing and notes that it was asked to."""
    compiles.append("asked")
    return graph.forward


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    compiles.clear()
    yield
    torch._dynamo.reset()  # type: ignore[no-untyped-call]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def _plain() -> Net:
    torch.manual_seed(0)
    return Net()


def _wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=_noting)  # type: ignore[return-value]


def _in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=_noting)
    return model


def _data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(30, 16, generator=generator) for _ in range(2)]


compilings = pytest.mark.parametrize("compiling", [_wrapped, _in_place], ids=["wrapped", "in place"])


@compilings
def test_a_compiled_model_gives_what_the_plain_one_gives(compiling: Callable[[nn.Module], nn.Module]) -> None:
    plain, data = _plain(), _data()
    compiled = compiling(copy.deepcopy(plain))
    options: dict[str, Any] = {"budget": BUDGET, "weighting": False}
    ours, theirs = rf.compress(plain, data, **options), rf.compress(compiled, data, **options)
    assert ours.plan.to_json() == theirs.plan.to_json()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[name], value)
    assert type(theirs.model) is Net
    assert compiles == []
    note = "the model was compiled and what comes back is not: for that, torch.compile(out.model)"
    assert note in theirs.report.notes
    assert note not in ours.report.notes
    done = rf.execute(compiled, data, theirs.plan)
    assert note in done.report.notes
    assert compiles == []


@compilings
def test_every_step_takes_a_compiled_model_by_its_plain_paths(compiling: Callable[[nn.Module], nn.Module]) -> None:
    model, data = compiling(_plain()), _data()
    sites = rf.find_sites(model, data[0])
    assert [site.path for site in sites] == ["first", "second"]
    assert [holding.path for holding in sites.holdings] == ["first", "second"]
    stats = rf.collect(model, data, sites=sites, statistics=["input-gram", "input-mean"])
    assert rf.collect_gradients(model, data, stats, sites=sites) is None
    plan = rf.make_plan(rf.measure(model, stats, sites=sites, families=[rf.WhitenedSVD()]), budget=BUDGET)
    assert len(rf.find_channels(model, sites)) == 1
    smaller = rf.apply(model, plan, stats=stats)
    assert rf.compare(model, smaller, data).samples == 60
    assert rf.agreement(model, smaller, data, corruptions=()) is not None
    assert rf.compare(model, _wrapped(smaller), data).samples == 60
    assert compiles == []


@compilings
def test_a_compiled_model_stays_compiled(compiling: Callable[[nn.Module], nn.Module]) -> None:
    model, data = compiling(_plain()), _data()
    rf.find_sites(model, data[0])
    model(data[0])
    assert compiles == ["asked"]


@compilings
def test_a_compiled_model_is_not_changed_in_place(compiling: Callable[[nn.Module], nn.Module]) -> None:
    model, data = _plain(), _data()
    plan = rf.compress(model, data, budget=BUDGET, weighting=False, repair=None).plan
    message = r"^model · what is changed in place is not compiled · .* · use rankfold\."
    compiled = compiling(model)
    with pytest.raises(ModelError, match=message):
        rf.apply_(compiled, plan, data)
    with pytest.raises(ModelError, match=message):
        rf.merge(compiled, plan, inplace=True)
    assert type(model.first) is nn.Linear


@compilings
def test_a_compiled_compressed_model_is_merged_as_the_plain_one(
    compiling: Callable[[nn.Module], nn.Module],
) -> None:
    model, data = _plain(), _data()
    out = rf.compress(model, data, budget=BUDGET, families=[rf.SVD()], weighting=False, repair=None)
    dense = rf.merge(compiling(out.model), out.plan)
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_a_compiled_part_is_refused_by_name() -> None:
    model = nn.Sequential(_plain(), nn.Linear(16, 4))
    model[0] = _wrapped(model[0])
    with pytest.raises(ModelError, match=r"^0 · no module inside the model is compiled .* · .*_orig_mod"):
        rf.find_sites(model, _data()[0])


def _quantised(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, kinds)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell, self.head = nn.LSTM(16, 8, batch_first=True), nn.GRUCell(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.rnn(x[:, None])[0][:, 0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "kinds", "named"),
    [
        (_plain(), {nn.Linear}, "first, second"),
        (nn.Sequential(_plain(), nn.Conv1d(1, 1, 1)), {nn.Linear}, "0.first, 0.second"),
        (Recurrent(), {nn.LSTM, nn.GRUCell}, "rnn, cell"),
    ],
    ids=["all", "a part", "recurrent"],
)
def test_packed_weights_are_refused_before_anything(model: nn.Module, kinds: set[type[nn.Module]], named: str) -> None:
    packed, data = _quantised(model, kinds), _data()

    def never(_: nn.Module, __: Any) -> None:
        raise AssertionError("the model was run")

    packed.register_forward_pre_hook(never)
    message = rf"^{named.split(',')[0]} · every weight is a tensor that can be counted · got .* of {named} · .*float"
    with pytest.raises(ModelError, match=message):
        rf.compress(packed, data, budget=BUDGET)
    with pytest.raises(ModelError, match=message):
        rf.find_sites(packed, data[0])

"""The graph is that of the model, whatever the model takes and returns."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.data.batches import batch_size, split_batch, take
from rankfold.errors import DataError
from rankfold.graph.trace import Graph, trace


def _wrap(forward: Any, **parts: nn.Module) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    return Model().eval()


def _rerun(graph: Graph, x: Tensor) -> list[Tensor]:
    """What the program gives on an input, flat."""
    assert graph.program is not None, graph.reason
    with torch.no_grad():
        output = graph.program.module()(x)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_the_graph_takes_any_batch_and_equals_the_model(samples: int) -> None:
    model = _wrap(lambda self, x: self.fc(x).relu() + x)
    graph = trace(model, X)
    assert graph.static_batch is None
    with torch.no_grad():
        torch.testing.assert_close(_rerun(graph, X[:samples])[0], model(X[:samples]), rtol=0, atol=0)


def test_operators_in_place_are_made_functional() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = y.clone()
        y.add_(1.0)
        y[:, 0] = 0.0
        return y.relu_() * z

    model = _wrap(forward)
    graph = trace(model, X)
    assert graph.program is not None
    for node in graph.program.graph.nodes:
        assert not str(node.target).partition(".")[0].endswith("_"), node.target
    with torch.no_grad():
        torch.testing.assert_close(_rerun(graph, X)[0], model(X))


def test_a_norm_that_writes_its_running_moments_is_made_functional() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(self.fc(x), self.norm.running_mean, self.norm.running_var, training=True)

    model = _wrap(forward, norm=nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = trace(model, X).program
    assert program is not None
    assert not any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_program_that_writes_nothing_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("traced a second time")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    model = _wrap(lambda self, x: self.norm(self.fc(x)).relu() + x, norm=nn.BatchNorm1d(4))
    assert trace(model, X).program is not None
    assert trace(_wrap(lambda self, x: self.fc(x).relu_()), X).program is None


def test_parameters_keep_their_dotted_names() -> None:
    program = trace(_wrap(lambda self, x: self.body(self.fc(x)), body=nn.Sequential(nn.Linear(4, 2))), X).program
    assert program is not None
    assert set(program.graph_signature.parameters) == {"fc.weight", "fc.bias", "body.0.weight", "body.0.bias"}


@dataclass
class Output:
    """An output class that torch does not know."""

    logits: Tensor
    cache: object


class Cache:
    """An object with a tensor inside."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


OUTPUTS: dict[str, Any] = {
    "tensor": lambda self, x: self.fc(x),
    "tuple": lambda self, x: (self.fc(x), x),
    "dict": lambda self, x: {"logits": self.fc(x)},
    "ordered": lambda self, x: OrderedDict(logits=self.fc(x)),
    "dataclass": lambda self, x: Output(self.fc(x), Cache(x)),
    "cache beside": lambda self, x: (self.fc(x), Cache(x)),
    "numbers beside": lambda self, x: (self.fc(x), 3, None, "text"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_many_kinds_export(kind: str) -> None:
    model = _wrap(OUTPUTS[kind])
    graph = trace(model, X)
    with torch.no_grad():
        torch.testing.assert_close(_rerun(graph, X)[0], model.fc(X))
    assert type(model(X)) is type(OUTPUTS[kind](model, X))
    assert "forward" not in vars(model)


def test_an_output_without_a_tensor_is_no_graph() -> None:
    graph = trace(_wrap(lambda self, x: Cache(self.fc(x))), X)
    assert graph.program is None
    assert graph.reason == "torch.export failed (TypeError: the output holds no tensor that torch.export can follow)"


def test_a_forward_given_to_the_instance_is_there_again_afterwards() -> None:
    model = _wrap(lambda self, x: self.fc(x))
    given = lambda x: {"logits": model.fc(x) * 2}  # noqa: E731
    model.forward = given  # type: ignore[method-assign]
    graph = trace(model, X)
    assert vars(model)["forward"] is given
    with torch.no_grad():
        torch.testing.assert_close(_rerun(graph, X)[0], model.fc(X) * 2)


def test_a_batch_of_one_is_traced_for_any_batch() -> None:
    model = _wrap(lambda self, x: self.fc(x))
    graph = trace(model, X[:1])
    assert graph.static_batch is None
    assert len(_rerun(graph, X)[0]) == 6


def test_a_fixed_batch_size_is_noted() -> None:
    model = _wrap(lambda self, x: self.fc(x.view(6, 2, 2).reshape(6, 4)))
    graph = trace(model, X)
    assert graph.static_batch == 6
    with torch.no_grad():
        torch.testing.assert_close(_rerun(graph, X)[0], model(X))


def test_an_axis_that_cannot_be_free_is_noted() -> None:
    model = _wrap(lambda self, x: self.fc(x) + torch.zeros(int(x.shape[0]) // 2 * 2 - int(x.shape[0]) + 1))
    assert trace(model, X).static_batch == 2


def test_a_branch_on_data_is_a_reason_and_no_graph() -> None:
    graph = trace(_wrap(lambda self, x: self.fc(x) if x.sum() > 0 else x), X)
    assert graph.program is None
    assert graph.reason is not None
    assert graph.reason.startswith("torch.export failed (")
    assert "\n" not in graph.reason


def test_state_that_the_forward_keeps_is_real_afterwards() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.last = self.fc(x)
        return self.last  # type: ignore[no-any-return]

    model = _wrap(forward)
    trace(model, X)
    with torch.no_grad():
        assert torch.equal(model(X), model.fc(X))
        assert type(model.last) is Tensor


def test_a_batch_is_split_into_arguments() -> None:
    assert split_batch(X) == ((X,), {})
    assert split_batch((X, torch.zeros(6)))[0][0] is X
    assert split_batch({"a": X, "b": 3})[1]["b"] == 3


@pytest.mark.parametrize("bad", [3, "text", (), [], {}, {1: X}, ("text", X), None])
def test_other_things_are_no_batch(bad: Any) -> None:
    with pytest.raises(
        DataError, match=r"data · a batch is a tensor, a tuple whose first item is the input, or a dict"
    ):
        split_batch(bad)


def test_a_dict_without_a_tensor_is_no_batch() -> None:
    with pytest.raises(DataError, match=r"a dict batch holds at least one tensor · got keys \['a'\]"):
        split_batch({"a": 1})


@pytest.mark.parametrize("empty", [torch.zeros(0, 4), torch.zeros(())])
def test_a_batch_without_samples_is_refused(empty: Tensor) -> None:
    with pytest.raises(DataError, match="at least one sample along its first axis · got shape"):
        batch_size(empty)


def test_samples_are_taken_from_what_is_per_sample_alone() -> None:
    batch = {"x": X, "scale": torch.tensor(2.0), "table": torch.zeros(3, 3), "gain": 2}
    picked = take(batch, torch.tensor([4, 1]))
    assert isinstance(picked, dict)
    assert torch.equal(picked["x"], X[[4, 1]])
    assert picked["table"].shape == (3, 3)
    assert picked["gain"] == 2


class Head(nn.Module):
    """Two kilobytes of logits a sample of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_the_largest_value_of_a_sample_bounds_how_many_run_at_once() -> None:
    graph = trace(Head().eval(), torch.randn(4, 8))
    assert graph.largest == 500 * 4
    assert graph.at_once(128) == 128
    assert graph.at_once(128, room=10_000) == 5
    assert graph.at_once(128, room=10) == 1


def test_a_graph_of_a_fixed_batch_knows_no_sample() -> None:
    assert Graph(None, reason="none").at_once(32, room=1) == 32


def test_a_value_of_as_many_entries_as_the_data_has_bounds_nothing() -> None:
    class Distinct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"y": self.last(torch.relu(hidden)), "classes": torch.unique(hidden.argmax(1))}

    torch.manual_seed(0)
    model, data = Distinct().eval(), [torch.randn(96, 16)]
    assert trace(model, data[0]).largest == 64 * 4
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), repair=None)
    assert out.report.after.params <= 0.6 * out.report.before.params

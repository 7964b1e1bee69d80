"""Laws of `apply` and `merge`: shells in place of layers, and one dense layer again in place of a shell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import DataError, ModelError, PlanError
from rankfold.layers import adapter_for
from rankfold.sites.finding import fingerprint
from rankfold.testing import LAYERS, toy_layer, toy_network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")

METHODS = {
    "matrix": rf.SVD(),
    "mirrored": rf.SVD(mirrored=True),
    "spatial": rf.SpatialSVD(whitened=False),
    "tucker": rf.Tucker2(whitened=False),
}


def plan_for(model: nn.Module, *decisions: rf.Decision) -> rf.Plan:
    return rf.Plan(decisions, (), fingerprint(model), type(model).__name__)


def middle(method: rf.Decomposition, layer: nn.Module) -> int | tuple[int, ...]:
    """A rank in the middle of what the layer can have."""
    adapter = adapter_for(layer)
    assert adapter is not None
    ranks = method.ranks(adapter.geometry(layer).canonical_shape)
    return ranks[len(ranks) // 2]


CASES = [
    (name, form)
    for name in LAYERS
    for form, method in METHODS.items()
    if method.refuses(adapter_for(layer := toy_layer(name)[0]).geometry(layer).canonical_shape) is None  # type: ignore[union-attr]
]


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_merging_gives_the_outputs_of_the_shell(name: str, form: str, bias: bool) -> None:
    layer, inputs = toy_layer(name, bias=bias)
    method = METHODS[form]
    plan = plan_for(layer, rf.Decision("", method, middle(method, layer)))
    shell = rf.apply(layer, plan)
    dense = rf.merge(shell, plan)
    assert isinstance(shell, nn.Sequential)
    assert isinstance(dense, nn.Linear if "Conv1D" in name else type(layer))
    assert (dense.bias is None) == (layer.bias is None)
    with torch.no_grad():
        torch.testing.assert_close(dense(inputs), shell(inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LAYERS if "Conv1D" not in name])
def test_a_merged_layer_is_wired_as_the_original(name: str) -> None:
    layer, inputs = toy_layer(name)
    plan = plan_for(layer, rf.Decision("", rf.SVD(), middle(rf.SVD(), layer)))
    dense = rf.merge(rf.apply(layer, plan), plan)
    full = rf.SVD().ranks(adapter_for(layer).geometry(layer).canonical_shape)[-1]  # type: ignore[union-attr]
    exact = plan_for(layer, rf.Decision("", rf.SVD(), full))
    again = rf.merge(rf.apply(layer, exact), exact)
    assert {n: tuple(p.shape) for n, p in dense.named_parameters()} == {
        n: tuple(p.shape) for n, p in layer.named_parameters()
    }
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), layer(inputs), rtol=1e-9, atol=1e-11)


MODEL, INPUTS = toy_network()
PLAN = plan_for(
    MODEL,
    rf.Decision("3.body.0", rf.Tucker2(whitened=False), (4, 5)),
    rf.Decision("4", rf.SVD(), 3),
    rf.Decision("8.shared.0", rf.SVD(), 4),
    rf.Decision("9"),
)


def test_a_merged_model_has_the_structure_of_the_original_and_computes_what_the_compressed_does() -> None:
    compressed = rf.apply(MODEL, PLAN)
    dense = rf.merge(compressed, PLAN)
    assert fingerprint(dense) == fingerprint(MODEL)
    with torch.no_grad():
        torch.testing.assert_close(dense(INPUTS), compressed(INPUTS), rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_compressed_model_unless_asked() -> None:
    compressed = rf.apply(MODEL, PLAN)
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    rf.merge(compressed, PLAN)
    assert list(compressed.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())
    assert rf.merge(compressed, PLAN, inplace=True) is compressed
    assert isinstance(compressed[4], nn.Conv2d)


def test_merging_anything_but_the_shells_of_the_plan_is_refused() -> None:
    compressed = rf.apply(MODEL, PLAN)
    other = PLAN.with_decision(rf.Decision("4", rf.SVD(), 2))
    for model, plan, path in (
        (MODEL, PLAN, "3.body.0"),
        (compressed, other, "4"),
        (compressed, PLAN.with_decision(rf.Decision("4", rf.SVD(mirrored=True), 3)), "4"),
        (nn.Sequential(), PLAN, "3.body.0"),
    ):
        before = list(model.state_dict())
        with pytest.raises(PlanError, match=rf"^'{path}' · a shell that the plan made · got .* · pass the compressed"):
            rf.merge(model, plan, inplace=True)
        assert list(model.state_dict()) == before


@pytest.mark.parametrize("trainable", [True, False])
def test_dtype_mode_and_requires_grad_are_kept_by_apply_and_merge(trainable: bool) -> None:
    model = toy_network()[0].double().train()
    model[4].eval()
    model[4].weight.requires_grad_(trainable)
    plan = plan_for(model, *PLAN.decisions)
    shell = rf.apply(model, plan)[4]
    layers = (shell, rf.merge(rf.apply(model, plan), plan)[4])
    for layer in layers:
        assert not layer.training
        for name, parameter in layer.named_parameters():  # the bias was not frozen
            assert parameter.dtype == torch.float64
            assert parameter.requires_grad == (trainable or name.endswith("bias"))


def test_apply_leaves_the_original_alone_and_shares_no_storage_with_it() -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    compressed = rf.apply(MODEL, PLAN)
    with torch.no_grad():
        for value in compressed.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


def test_apply_in_place_gives_what_apply_gives_and_returns_the_root() -> None:
    model = toy_network()[0]
    root = rf.apply_(model, PLAN)
    assert root is model
    expected = rf.apply(MODEL, PLAN).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in root.state_dict().items())
    layer = nn.Linear(6, 6)
    assert isinstance(rf.apply_(layer, plan_for(layer, rf.Decision("", rf.SVD(), 2))), nn.Sequential)


def test_a_shared_layer_stays_shared() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x))
            return result

    model = Two()
    plan = plan_for(model, rf.Decision("a", rf.SVD(), 2))
    compressed = rf.apply(model, plan)
    assert compressed.a is compressed.b
    dense = rf.merge(compressed, plan)
    assert dense.a is dense.b
    assert fingerprint(dense) == fingerprint(model)


def test_a_method_that_reads_statistics_asks_for_data() -> None:
    plan = plan_for(MODEL, rf.Decision("4", rf.WhitenedSVD(), 3))
    with pytest.raises(DataError, match=r"^data · the plan reads input-gram, input-mean · got neither .* · pass the"):
        rf.apply(MODEL, plan)


def test_a_repair_asks_for_data() -> None:
    plan = rf.Plan((rf.Decision("4", rf.SVD(), 3),), (), fingerprint(MODEL), repair={"name": "lockstep"})
    with pytest.raises(DataError, match=r"^data · the plan reads the calibration inputs \(repair\) · got"):
        rf.apply(MODEL, plan)


def test_a_model_that_cannot_be_copied_is_refused_with_the_cure() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.handle = (value for value in ())  # type: ignore[assignment,var-annotated]
    with pytest.raises(ModelError, match=r"^Sequential · the model can be copied.* · use rankfold\.apply_, which"):
        rf.apply(model, plan_for(model, rf.Decision("0", rf.SVD(), 2)))
    assert isinstance(rf.apply_(model, plan_for(model, rf.Decision("0", rf.SVD(), 2)))[0], nn.Sequential)

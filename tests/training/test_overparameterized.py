"""Layers written as products and multiplied back: the same output, and an optimizer that knows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import OptionError, SiteError
from rankfold.testing import LAYERS, toy_layer
from rankfold.training import Orthogonality, Overparameterized, check_optimizer, merge, overparameterize


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 6, 1, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


def shapes(model: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    return {
        path: [tuple(part.weight.shape) for part in module.children()]  # type: ignore[union-attr, arg-type]
        for path, module in model.named_modules()
        if isinstance(module, Overparameterized)
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_stays_and_merging_gives_the_layer_back(name: str, bias: bool) -> None:
    layer, inputs = toy_layer(name, bias=bias, dtype=torch.float64)
    try:
        wide = overparameterize(layer)
    except SiteError:
        pytest.skip("a layer with a single channel on a side, or a table")
    assert isinstance(wide, Overparameterized)
    with torch.no_grad():
        torch.testing.assert_close(wide(inputs), layer(inputs), rtol=1e-9, atol=1e-9)
        for part in wide.parameters():  # whatever training makes of the factors
            part.add_(0.1 * torch.randn_like(part))
        dense = merge(wide)
        torch.testing.assert_close(dense(inputs), wide(inputs), rtol=1e-9, atol=1e-9)
    assert not isinstance(dense, Overparameterized)
    assert sum(each.numel() for each in dense.parameters()) == sum(each.numel() for each in layer.parameters())


def test_in_single_precision_outputs_agree_to_a_hundred_thousandth() -> None:
    model, x = network().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, got = model(x), overparameterize(model)(x)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_kernel_has_three_layers_and_a_matrix_two_and_depthwise_ones_stay() -> None:
    model = network()
    found = shapes(overparameterize(model))
    assert found == {
        "0": [(3, 3, 1, 1), (12, 3, 3, 3), (12, 12, 1, 1)],
        "4": [(6, 12, 1, 1), (6, 6, 1, 1)],
        "6": [(5, 96), (5, 5)],
    }
    assert isinstance(model[0], nn.Conv2d)  # the model given is untouched
    assert list(shapes(overparameterize(model, only=["[06]"], exclude=["6"]))) == ["0"]


def test_outer_layers_start_orthonormal() -> None:
    wide = overparameterize(network().double())
    penalty = Orthogonality(1.0)
    values = penalty.values(wide)
    assert sorted(values) == ["0.0", "0.2", "4.1", "6.1"]
    assert float(penalty(wide).detach()) == pytest.approx(0, abs=1e-12)
    assert set(Orthogonality(1.0, of="all").values(wide)) > set(values)


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.Adam(p, 1e-3)]
)
def test_an_optimizer_goes_on_with_the_new_weights(make: Any) -> None:
    model = network()
    weights = [each for name, each in model.named_parameters() if name.endswith("weight")]
    rest = [each for name, each in model.named_parameters() if not name.endswith("weight")]
    optimizer = make([{"params": weights, "lr": 0.01}, {"params": rest}])
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    biases = {id(model[3].bias), id(model[4].bias), id(model[6].bias)}
    known = {key: value for key, value in optimizer.state.items() if id(key) in biases}
    assert overparameterize(model, optimizer=optimizer, inplace=True) is model
    check_optimizer(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3 + 1 + 1 + 2 + 2, len(rest)]
    assert all(optimizer.state[key] is value for key, value in known.items())
    before = copy.deepcopy(model.state_dict())
    step()
    assert all(not torch.equal(before[name], each) for name, each in model.named_parameters())
    merge(model, optimizer=optimizer, inplace=True)
    check_optimizer(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(weights), len(rest)]
    step()


def test_an_optimizer_from_before_is_found() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    check_optimizer(model, optimizer)
    wide = overparameterize(model, inplace=True)
    with pytest.raises(OptionError, match=r"7 of 13 that it does not hold, such as '0\.0\.weight' · build it after"):
        check_optimizer(wide, optimizer)
    with pytest.raises(OptionError, match="a model that is changed in place"):
        overparameterize(network(), optimizer=optimizer)


def test_what_is_frozen_stays_frozen() -> None:
    model = network()
    model[0].requires_grad_(False)
    wide = overparameterize(model)
    assert {each.requires_grad for each in wide[0].parameters()} == {False}  # type: ignore[index]
    assert {each.requires_grad for each in wide[6].parameters()} == {True}  # type: ignore[index]
    assert {each.requires_grad for each in merge(wide)[0].parameters()} == {False}  # type: ignore[index]


def test_bad_selections_and_nothing_to_do() -> None:
    with pytest.raises(SiteError, match="'head' · a selection names layers of the model that the call is about"):
        overparameterize(network(), only=["head"])
    with pytest.raises(SiteError, match="a layer is left that can be replaced"):
        overparameterize(nn.Sequential(nn.Embedding(9, 4)))
    with pytest.raises(SiteError, match="a layer that overparameterize made"):
        merge(network())


def test_a_merged_network_is_compressed_as_any_other() -> None:
    """The road of He, Jiang and Wu: train the product, merge, ranks by variational Bayes, Tucker-2."""
    model = merge(overparameterize(network())).eval()
    data = [torch.randn(32, 3, 8, 8)]
    out = rf.compress(model, data, families=[rf.Tucker2(whitened=False)], selector=rf.EVBMF(weaken=0.5, noise="clamp"))
    assert out.report.after.params < out.report.before.params


def test_layers_that_are_read_elsewhere_tied_or_computed_stay() -> None:
    """As in `find_sites`: they would be read by code that knows nothing of the factors, or trained no more."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(SiteError, match="a layer is left that can be replaced"):
        overparameterize(encoder)
    head = nn.Linear(8, 20, bias=False)
    tied = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), head)
    head.weight = tied[0].weight  # type: ignore[assignment]
    wide = overparameterize(tied)
    assert list(shapes(wide)) == ["1"]
    assert wide[2].weight is wide[0].weight  # type: ignore[index]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 4))
    normed[1].register_forward_hook(lambda module, args, output: output * 2)
    assert list(shapes(overparameterize(normed))) == ["2"]
    for path, why in (("0", "parametrised"), ("1", "hooked")):
        with pytest.raises(SiteError, match=f"a layer that is left alone \\({why}"):
            overparameterize(normed, only=[path])
    with pytest.raises(SiteError, match="a layer is left that can be replaced"):
        overparameterize(nn.Sequential(overparameterize(nn.Linear(4, 4))))


def test_names_of_an_optimizer_follow() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)  # type: ignore[arg-type]
    overparameterize(model, optimizer=optimizer, inplace=True)
    (group,) = optimizer.param_groups
    assert len(group["param_names"]) == len(group["params"])
    assert group["param_names"][:3] == ["0.weight.0", "0.weight.1", "0.weight.2"]

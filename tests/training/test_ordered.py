"""Ordered layers: the same output, one pair a batch, and the singular value decomposition as what training finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import NumericsError, OptionError, SiteError
from rankfold.testing import LAYERS, toy_layer
from rankfold.testing.matrices import normal
from rankfold.training import (
    HierarchicalLasso,
    Ordered,
    OrderedSampler,
    check_optimizer,
    drop_ranks,
    merge_ordered,
    to_ordered,
)
from rankfold.training.ordered import showing


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_stays_and_ranks_are_those_of_the_svd(name: str, bias: bool) -> None:
    layer, inputs = toy_layer(name, bias=bias, dtype=torch.float64)
    try:
        ordered = to_ordered(layer)
    except SiteError:
        pytest.skip("grouped, transposed, a table, or a single channel on a side")
    assert isinstance(ordered, Ordered)
    with torch.no_grad():
        torch.testing.assert_close(ordered(inputs), layer(inputs), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(merge_ordered(ordered)(inputs), layer(inputs), rtol=1e-9, atol=1e-9)
        ordered.shown = 2
        dense = merge_ordered(ordered)
        torch.testing.assert_close(ordered(inputs), dense(inputs), rtol=1e-9, atol=1e-9)
    weight = dense.weight.detach()
    whole = layer.weight.detach()
    assert isinstance(weight, Tensor)
    assert isinstance(whole, Tensor)
    if name == "transformers Conv1D":  # stored in × out
        whole = whole.mT
    matrix = weight.reshape(whole.shape).flatten(1)
    u, s, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
    torch.testing.assert_close(matrix, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-8, atol=1e-8)


def test_one_layer_is_cut_in_training_and_none_in_eval_mode() -> None:
    model = to_ordered(network())
    sampler = OrderedSampler(model)
    x = torch.randn(4, 3, 4, 4)
    with torch.no_grad():
        expected = model.eval()(x)
        for _ in range(sampler.pairs):
            path, rank = sampler.step()
            cut = {name: layer.sampled for name, layer in model.named_children() if isinstance(layer, Ordered)}
            assert {name: each for name, each in cut.items() if each is not None} == {path: rank}
            assert torch.equal(model.eval()(x), expected)
            layer = model.get_submodule(path)
            assert isinstance(layer, Ordered)
            alone = torch.randn(2, 3, 4, 4) if path == "0" else torch.randn(2, 8, 4, 4) if path == "3" else None
            if alone is not None and rank < layer.rank:
                whole, part = layer.eval()(alone), layer.train()(alone)
                assert not torch.equal(whole, part)
        sampler.rest()
        layer = model[0]
        assert torch.equal(layer.train()(x), layer.eval()(x))


def test_every_pair_comes_once_a_round_and_rounds_differ() -> None:
    model = to_ordered(network())
    sampler = OrderedSampler(model, seed=3)
    rounds = [[sampler.step() for _ in range(sampler.pairs)] for _ in range(2)]
    expected = {("0", rank) for rank in range(1, 9)} | {("3", r) for r in range(1, 5)} | {("5", r) for r in range(1, 6)}
    for each in rounds:
        assert Counter(each) == Counter(expected)
    assert rounds[0] != rounds[1]
    assert OrderedSampler(model, seed=3).step() == rounds[0][0]


def test_a_sampler_goes_on_where_it_stopped() -> None:
    model = to_ordered(network())
    sampler = OrderedSampler(model, seed=1)
    for _ in range(11):
        sampler.step()
    again = OrderedSampler(model)
    again.load_state_dict(sampler.state_dict())
    assert [again.step() for _ in range(40)] == [sampler.step() for _ in range(40)]
    other = to_ordered(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(OptionError, match="one that names '3'"):
        OrderedSampler(other).load_state_dict(sampler.state_dict())


def test_the_lasso_is_the_sum_over_all_tails() -> None:
    model = to_ordered(network().double())
    expected = 0.0
    for layer in model.children():
        if isinstance(layer, Ordered):
            left, right = (each.weight.detach() for each in (layer.second, layer.first))
            for rank in range(layer.rank):
                expected += float(left[:, rank:].norm() + right[rank:].norm())
    penalty = HierarchicalLasso(0.5)
    assert float(penalty(model).detach()) == pytest.approx(0.5 * expected, rel=1e-6)
    layer = model[3]
    assert isinstance(layer, Ordered)
    with torch.no_grad():
        layer.second.weight[:, 2:] = 0
        layer.first.weight[2:] = 0
    penalty(model).backward()  # tails that are 0 pull nowhere
    assert all(bool(torch.isfinite(each.grad).all()) for each in layer.parameters() if each.grad is not None)


def test_ranks_that_are_nothing_are_dropped_with_the_state_of_the_optimizer() -> None:
    model = to_ordered(network())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    layer = model[0]
    assert isinstance(layer, Ordered)
    with torch.no_grad():
        layer.first.weight[5:] *= 1e-9
    optimizer.state[layer.first.weight]["exp_avg"][0] = 7.0
    before = model.eval()(x)
    sampler = OrderedSampler(model)
    assert drop_ranks(model, optimizer=optimizer) == {"0": 5, "3": 4, "5": 5}
    assert isinstance(layer.first, nn.Conv2d)
    assert isinstance(layer.second, nn.Conv2d)
    assert (layer.first.out_channels, layer.second.in_channels, layer.rank) == (5, 5, 5)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    check_optimizer(model, optimizer)
    state = optimizer.state[layer.first.weight]["exp_avg"]
    assert state.shape == layer.first.weight.shape
    assert torch.equal(state[0], torch.full_like(state[0], 7.0))
    for _ in range(2 * sampler.pairs):  # ranks that are gone are not drawn
        path, rank = sampler.step()
        assert path != "0" or rank <= 5
    nn.functional.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def test_ranks_are_shown_for_a_while() -> None:
    model, x = to_ordered(network()).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        before = model(x)
        with showing(model, {"0": 2}):
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


def trained(target: Tensor, inputs: Tensor) -> Ordered:
    """An ordered layer from random factors, trained on `y = target x` with the sampler."""
    torch.manual_seed(0)
    layer = to_ordered(nn.Linear(inputs.shape[1], len(target), bias=False).double())
    assert isinstance(layer, Ordered)
    sampler = OrderedSampler(layer)
    steps = 300 * sampler.pairs
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    wanted = inputs @ target.mT
    for _ in range(steps):
        sampler.step()
        optimizer.zero_grad()
        (layer(inputs) - wanted).square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
    sampler.rest()
    return layer


def product(layer: Ordered, rank: int) -> Tensor:
    left, right = layer.second.weight.detach(), layer.first.weight.detach()
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return left[:, :rank] @ right[:rank]


def test_training_finds_the_svd_of_a_linear_map_with_isotropic_inputs() -> None:
    u, v = (torch.linalg.qr(normal(5, 5, seed=seed))[0] for seed in (1, 2))
    values = torch.tensor([4.0, 2.5, 1.5, 0.8, 0.3], dtype=torch.float64)
    target = (u * values) @ v.mT
    inputs = torch.linalg.qr(normal(40, 5, seed=3))[0] * 40**0.5  # exactly isotropic
    layer = trained(target, inputs)
    for rank in range(1, 6):
        best = (u[:, :rank] * values[:rank]) @ v[:, :rank].mT
        assert float((product(layer, rank) - best).norm() / best.norm()) < 0.02, rank


def test_training_finds_the_principal_components_of_an_identity_map() -> None:
    turned = torch.linalg.qr(normal(4, 4, seed=1))[0]
    scales = torch.tensor([3.0, 1.8, 1.0, 0.5], dtype=torch.float64)
    inputs = torch.linalg.qr(normal(40, 4, seed=2))[0] * 40**0.5 * scales @ turned.mT
    layer = trained(torch.eye(4, dtype=torch.float64), inputs)
    for rank in range(1, 5):
        best = turned[:, :rank] @ turned[:, :rank].mT
        assert float((product(layer, rank) - best).norm() / best.norm()) < 0.02, rank


def test_what_cannot_be() -> None:
    with pytest.raises(SiteError, match=r"call rankfold\.training\.to_ordered first"):
        OrderedSampler(network())
    with pytest.raises(SiteError, match="to_ordered first"):
        HierarchicalLasso(0.1)(network())
    with pytest.raises(SiteError, match="'head' · a selection names layers of the model that the call is about"):
        to_ordered(network(), only=["head"])
    with pytest.raises(OptionError, match=r"drop_ranks\.least"):
        drop_ranks(to_ordered(network()), least=-1.0)


def test_a_checkpoint_with_fewer_ranks_is_loaded() -> None:
    model = to_ordered(network())
    layer = model[0]
    assert isinstance(layer, Ordered)
    with torch.no_grad():
        layer.first.weight[5:] = 0
    ranks = drop_ranks(model)
    again = to_ordered(network(), ranks=ranks)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))
    for bad, said in (({"0": 99}, "a rank from 1 to 8"), ({"7": 1}, "a layer that is replaced")):
        with pytest.raises(OptionError, match=said):
            to_ordered(network(), ranks=bad)


def test_nan_drops_nothing() -> None:
    model = to_ordered(network())
    layer = model[0]
    assert isinstance(layer, Ordered)
    with torch.no_grad():
        layer.second.weight[0, 3] = float("nan")
    with pytest.raises(NumericsError, match="drop_ranks at '0'"):
        drop_ranks(model)
    assert layer.rank == 8


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_whose_state_cannot_be_cut_is_refused(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = to_ordered(network())
    optimizer = make(model.parameters())
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    layer = model[0]
    assert isinstance(layer, Ordered)
    with torch.no_grad():
        layer.first.weight[5:] = 0
    with pytest.raises(OptionError, match="drop ranks without optimizer="):
        drop_ranks(model, optimizer=optimizer)
    assert layer.rank == 8
    assert drop_ranks(model)["0"] == 5


def test_the_lasso_of_half_precision_is_computed_in_single() -> None:
    model = to_ordered(nn.Sequential(nn.Linear(32, 16))).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(200)
    assert float(HierarchicalLasso(1.0)(model).detach()) > 100

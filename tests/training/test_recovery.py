"""Distillation without labels: it can only help on held-out samples, and says what it cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.digits import calibration, held_out, trained
from rankfold.errors import DataError, ModelError, NumericsError, OptionError
from rankfold.training import recover


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """The digits network at a fifth of its parameters, without repair: there is something to recover."""
    families = [rf.WhitenedSVD()]
    out = rf.compress(trained(), calibration(), budget=rf.Budget(params=0.2), families=families, repair=None)
    return out.model


def agreement(model: nn.Module) -> float:
    return rf.compare(trained(), model, held_out()).agreement or 0.0


@pytest.mark.parametrize(("parts", "loss"), [("all", "error"), ("norms", "error"), ("blocks", "error"), ("all", "kl")])
def test_it_helps_and_leaves_both_networks_as_they_were(small: nn.Module, parts: str, loss: str) -> None:
    original = trained()
    before = [copy.deepcopy(each.state_dict()) for each in (original, small)]
    flags = [parameter.requires_grad for parameter in small.parameters()]
    told: list[tuple[int, float]] = []
    out = recover(
        original, small, calibration(), steps=60, parts=parts, loss=loss, told=lambda *each: told.append(each)
    )
    assert out.after < out.before
    assert agreement(out.model) > agreement(small)
    for model, state in zip((original, small), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in out.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in out.model.parameters())
    assert told == list(out.losses)
    assert 0 < out.best <= out.steps <= 60
    changed = {
        name for name, value in out.model.named_parameters() if not torch.equal(value, small.get_parameter(name))
    }
    if parts == "norms":
        assert changed
        assert all(small.get_parameter(name).ndim < 2 for name in changed)
    else:
        assert any(small.get_parameter(name).ndim > 1 for name in changed)


def test_what_it_cost_is_counted(small: nn.Module) -> None:
    seen = {"original": 0, "compressed": 0}
    original, other = trained(), copy.deepcopy(small)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] += len(args[0])

        return hook

    original.register_forward_pre_hook(count("original"))
    other.register_forward_pre_hook(count("compressed"))
    out = recover(original, other, calibration(), steps=10, batch=32, patience=50)
    total = sum(len(each) for each in calibration())
    assert seen["original"] == seen["compressed"]
    steps = 10 * 32
    assert out.forwards == pytest.approx((seen["original"] + seen["compressed"] + 2 * steps) / total)


def test_the_same_seed_gives_the_same_bits(small: nn.Module) -> None:
    state = torch.get_rng_state()
    first, second, other = (
        recover(trained(), small, calibration(), steps=12, seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_what_does_not_help_is_not_kept(small: nn.Module) -> None:
    out = recover(trained(), small, calibration(), steps=20, rate=0.5, patience=2)  # far too fast
    assert (out.before, out.best) == (out.after, 0)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in out.model.state_dict().items())
    assert out.steps < 20


def test_it_stops_when_it_gets_no_better() -> None:
    out = recover(trained(), trained(), calibration(), steps=100, patience=3)
    assert out.before == out.after == 0
    assert (out.best, out.steps) == (0, 15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": "factors"}, r"recover\.parts"),
        ({"loss": "mse"}, r"recover\.loss"),
        ({"steps": 0}, r"recover\.steps"),
        ({"batch": 1.5}, r"recover\.batch"),
        ({"rate": 0.0}, r"recover\.rate"),
        ({"patience": 0}, r"recover\.patience"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_named(small: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        recover(trained(), small, calibration(), **options)


def test_bad_data_and_models_are_named(small: nn.Module) -> None:
    with pytest.raises(DataError, match="samples enough to hold some out"):
        recover(trained(), small, calibration()[0][:1])
    with pytest.raises(ModelError, match="blocks: children of"):
        recover(nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(20, 3), parts="blocks")
    with pytest.raises(ModelError, match="parameters to train"):
        recover(nn.Linear(3, 2), nn.Linear(3, 2, bias=False), torch.randn(20, 3), parts="norms")
    with pytest.raises(NumericsError, match="the loss on held-out samples is finite"):
        recover(nn.Linear(3, 2), nn.Linear(3, 2), torch.full((20, 3), float("nan")))


def test_small_batches_are_put_together(small: nn.Module) -> None:
    sizes = []
    other = copy.deepcopy(small)
    other.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    data = [part for batch in calibration() for part in batch.split(2)]
    recover(trained(), other, data, steps=3, batch=32, patience=50)
    assert 30 <= max(sizes) <= 32


def test_networks_that_do_not_belong_together_and_half_precision() -> None:
    x = torch.randn(20, 3)
    with pytest.raises(DataError, match="both models give outputs of one shape"):
        recover(nn.Linear(3, 10), nn.Linear(3, 1), x)
    with pytest.raises(ModelError, match="train it in float32"):
        recover(nn.Linear(3, 2).half(), nn.Linear(3, 2).half(), x.half())
    with torch.no_grad():
        assert recover(nn.Linear(3, 2), nn.Linear(3, 2), x, steps=2).steps == 2

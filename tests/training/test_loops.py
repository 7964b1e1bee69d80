"""Penalties in loops of one's own and of libraries: gradients that are added, and one state for all parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import NumericsError, OptionError, SiteError
from rankfold.training import FirstDerivative, HierarchicalLasso, NuclearNorm, OrderedSampler, Regularizer, to_ordered
from rankfold.training.loops import Parts


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if each.grad is None else each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("penalty", [NuclearNorm(0.3), FirstDerivative(share=0.3)], ids=["weight", "share"])
def test_added_gradients_are_those_of_the_sum(penalty: Regularizer) -> None:
    model, x = network(), torch.randn(5, 6)
    loss = model(x).square().mean()
    (loss + penalty(model, loss)).backward()
    expected = gradients(model)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    penalty.load_state_dict({"means": None})
    with torch.no_grad():
        value = penalty.add_gradients(model, loss)
    assert not value.requires_grad
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_they_are_set_where_there_are_none_and_frozen_weights_have_none() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    NuclearNorm(0.3).add_gradients(model)
    assert [each is not None for each in gradients(model)] == [False, False, True, False]
    model[2].weight.requires_grad_(False)
    model.zero_grad()
    assert float(NuclearNorm(0.3).add_gradients(model)) > 0
    assert gradients(model) == [None] * 4


def test_of_several_optimizers_the_one_that_steps() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    NuclearNorm(0.3).add_gradients(model, optimizer=optimizer)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_an_error_changes_no_gradient() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="FirstDerivative at '2'"):
        FirstDerivative(0.3).add_gradients(model)
    assert gradients(model) == [None] * 4


def test_a_weight_of_which_a_part_is_here_is_refused() -> None:
    model = network()
    model[0].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(SiteError, match="every process holds the whole weight"):
        NuclearNorm(0.3)(model)
    assert list(NuclearNorm(0.3, exclude=["0"]).values(model)) == ["2"]
    empty = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    empty.append(nn.Linear(4, 2))
    empty[2].weight = nn.Parameter(torch.empty(0, 4))
    assert list(FirstDerivative(0.3).values(empty)) == ["0"]


def test_weights_that_are_computed_are_counted_each() -> None:
    model = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)) for _ in range(8)))
    assert len(NuclearNorm(0.3).values(model)) == 8


def test_parts_have_one_state_of_plain_values() -> None:
    model = to_ordered(network())
    parts = Parts((HierarchicalLasso(share=0.1), NuclearNorm(1e-3), NuclearNorm(1e-2)), OrderedSampler(model, seed=3))
    assert parts.names == ["HierarchicalLasso", "NuclearNorm-0", "NuclearNorm-1"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert parts.sampler is not None
    parts.sampler.step()
    assert set(parts.add_gradients(model, torch.tensor(2.0), optimizer)) == set(parts.names)
    again = Parts((HierarchicalLasso(share=0.1), NuclearNorm(1e-3), NuclearNorm(1e-2)), OrderedSampler(model))
    again.load_state_dict(parts.state_dict())
    assert again.state_dict() == parts.state_dict()
    with pytest.raises(OptionError, match="a state of the same penalties"):
        Parts((NuclearNorm(1e-3),), None).load_state_dict(parts.state_dict())


def test_no_gradient_is_added_where_a_later_penalty_fails() -> None:
    model = network()
    parts = Parts((NuclearNorm(0.1), FirstDerivative(0.1, only=["head"])), None)
    with pytest.raises(SiteError, match="'head'"):
        parts.add_gradients(model, None, torch.optim.SGD(model.parameters(), 0.1))
    assert gradients(model) == [None] * 4


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = to_ordered(network())
    parts = Parts((NuclearNorm(share=0.1),), OrderedSampler(model))
    before = parts.state_dict()
    other = {"penalties": {"NuclearNorm": {"means": [3.0, 4.0]}}, "sampler": {**before["sampler"], "order": [("9", 1)]}}
    states: list[dict[str, Any]] = [other, {}, {"penalties": 3}, {"penalties": {"NuclearNorm": {}}, "sampler": None}]
    for state in states:
        with pytest.raises(OptionError):
            parts.load_state_dict(state)
    assert parts.state_dict() == before


def test_gradients_that_are_set_are_of_the_layout_of_the_weight() -> None:
    class Sum(NuclearNorm):
        def penalty(self, weight: Tensor) -> Tensor:
            return weight.sum()

    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    Sum(0.5).add_gradients(model)
    assert model[0].weight.grad.stride() == model[0].weight.stride()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def test_an_optimizer_of_another_model_adds_nothing() -> None:
    model, other = network(), network()
    parts = Parts((NuclearNorm(0.3),), None)
    assert parts.add_gradients(model, None, torch.optim.SGD(other.parameters(), 0.1)) == {}
    assert gradients(model) == [None] * 4


def test_what_is_no_part_is_refused() -> None:
    with pytest.raises(OptionError, match="a penalty, or a sampler · got neither"):
        Parts((), None)
    with pytest.raises(OptionError, match="penalties, such as"):
        Parts((0.1,), None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="an OrderedSampler as sampler"):
        Parts((), NuclearNorm(0.1))  # type: ignore[arg-type]

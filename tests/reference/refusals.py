"""What tests of bad input share: a network, its inputs, and that a refusal leaves the network as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf

BUDGET = rf.Budget(params=0.7)


def network() -> nn.Sequential:
    """A perceptron with a dropout, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6)
        )


def inputs(samples: int = 24) -> Tensor:
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(4))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """State, modes, hooks and the global generator are the same afterwards."""
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    modules, generator = list(model.modules()), torch.get_rng_state()
    yield
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(
        torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, value in model.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), generator)


def refused(error: type[Exception], message: str, model: nn.Module, data: Any, **options: Any) -> None:
    with untouched(model), pytest.raises(error, match=message):
        rf.compress(model, data, **{"budget": BUDGET, **options})

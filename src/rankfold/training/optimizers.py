"""Parameters of an optimizer when parameters of its model are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.errors import OptionError
from rankfold.training._base import unwrapped

Replaced = Mapping[Tensor, Sequence[Tensor]]  # an old parameter → the new ones in its place


def replace_parameters(optimizer: Optimizer, replaced: Replaced) -> None:
    """Put new parameters in the place of old ones, in the same groups. What the optimizer knew of the old ones goes."""
    for group in optimizer.param_groups:
        names = group.get("param_names")  # of an optimizer that was given them
        if names is not None:
            own = zip(group["params"], names, strict=True)
            group["param_names"] = [
                name if old not in replaced else f"{name}.{index}"
                for old, name in own
                for index in range(len(replaced.get(old, (old,))))
            ]
        group["params"] = [new for old in group["params"] for new in replaced.get(old, (old,))]
    for old in replaced:
        optimizer.state.pop(old, None)


def check_cuttable(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state cannot be cut along with a weight.

    Raises:
        OptionError: It keeps tensors of other shapes than the weights, or a list of parameters of its own.
    """
    for parameter, known in optimizer.state.items():
        if not isinstance(parameter, Tensor) or isinstance(optimizer, torch.optim.LBFGS):
            continue
        for name, value in known.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise _uncuttable(optimizer, f"{name!r} of shape {tuple(value.shape)} for {tuple(parameter.shape)}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise _uncuttable(optimizer, "one vector for all weights")


def _uncuttable(optimizer: Optimizer, got: str) -> OptionError:
    return OptionError(
        f"optimizer {type(optimizer).__name__}",
        law="a state of the shape of the weights, which is cut with them",
        got=got,
        cure="drop ranks without optimizer=, and build it anew",
    )


def cut_parameters(optimizer: Optimizer, old: Tensor, new: Tensor, axis: int) -> None:
    """Put a parameter that is the first part of another one along an axis in its place, its state cut alike."""
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    known = optimizer.state.pop(old, None)
    if known is not None:
        optimizer.state[new] = {
            name: value.narrow(axis, 0, new.shape[axis]).clone()
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for name, value in known.items()
        }


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that was built before parameters of its model were replaced.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer, which may hold parameters of other modules too.

    Raises:
        OptionError: A parameter of the model that is to be trained is not in the optimizer; it is named.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {name: each for name, each in unwrapped(model).named_parameters() if each.requires_grad}
    missing = [name for name, each in own.items() if id(each) not in held]
    if missing:
        raise OptionError(
            "optimizer",
            law="it holds every parameter of the model that is to be trained",
            got=f"{len(missing)} of {len(own)} that it does not hold, such as {missing[0]!r}",
            cure="build it after parameters were replaced, or pass optimizer= to the function that replaces them",
        )

"""Activation that a layer's output goes through, and the per-channel steps before it."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rankfold.graph.nodes import operator_of
from rankfold.graph.regions import ADDS, SAME_VALUE, Call, is_batch_norm, is_channel_scale, same_shape

ACTIVATIONS = frozenset(
    {
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6"),
        *("selu", "sigmoid", "silu", "softplus", "tanh"),
    }
)


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function `φ` that alone reads `steps(y) + skip`.

    Attributes:
        steps: Nodes of the per-channel affine steps from the layer's output `y` on, in order, before any `add`.
        skip: True if the call's skip branch is added behind the steps.
        node: Node of `φ`.
    """

    steps: tuple[Node, ...]
    skip: bool
    node: Node

    def function(self, values: Tensor) -> Tensor:
        """`φ` on any tensor."""
        result: Tensor = self.node.target(values, *self.node.args[1:], **self.node.kwargs)  # type: ignore[operator]
        return result

    def affine(self, shape: Sequence[int], axis: int, value_of: Callable[[Node], Tensor]) -> tuple[Tensor, Tensor]:
        """Factor and offset of each channel by the steps, shape (channels,) each, in float64 on the CPU.

        Args:
            shape: Shape of the layer's output.
            axis: Its channel axis.
            value_of: Function that returns the tensor of a parameter or buffer node.
        """
        narrow = [1] * len(shape)
        narrow[axis] = shape[axis]
        ends = []
        for start in (0.0, 1.0):
            value: Any = torch.full(narrow, start, dtype=torch.float64)
            for node in self.steps:
                value = _step(node, value, value_of)
            ends.append(value.flatten())
        return ends[1] - ends[0], ends[0]


def activation_behind(call: Call, axis: int) -> Activation | None:
    """The activation that a call's output goes through, and nothing else; None where there is none.

    Args:
        call: Call of a layer.
        axis: Channel axis of its output, counted from the end.
    """
    steps: list[Node] = []
    here, added = call.exit, False
    while len(here.users) == 1:
        (user,) = here.users
        if operator_of(user) in ACTIVATIONS and user.args[0] is here:
            known = not any(isinstance(each, Node) for each in (*user.args[1:], *user.kwargs.values()))
            return Activation(tuple(steps), added, user) if known else None
        if user.target in ADDS and len(user.args) == 2 and not user.kwargs:
            if added or call.skip is None or call.skip not in user.args:
                return None
            added = True
        elif user.target in SAME_VALUE:
            pass
        elif added:
            return None
        elif _is_step(user, here, axis):
            steps.append(user)
        else:
            return None
        here = user
    return None


def _is_step(user: Node, here: Node, axis: int) -> bool:
    """Whether a node scales and shifts the channels of another, or takes the first result of a norm that does."""
    if user.target is python_operator.getitem:
        return bool(user.args[1] == 0)
    if user.target in (torch.ops.aten.mul.Tensor, python_operator.mul):
        others = [arg for arg in user.args if isinstance(arg, Node) and arg is not here]
        return is_channel_scale(user, here) and same_shape(user, here) and _lies_on(axis, others[0].meta["val"])
    value = here.meta.get("val")
    # a batch norm scales axis 1, which is not that of a linear layer's outputs where tokens stand in between
    return is_batch_norm(user) and user.args[0] is here and isinstance(value, Tensor) and value.ndim + axis == 1


def _lies_on(axis: int, value: Tensor) -> bool:
    """Whether a tensor varies along one axis alone, counted from the end."""
    return all(size == 1 or place == axis for place, size in enumerate(value.shape, -value.ndim))


def _step(node: Node, value: Any, value_of: Callable[[Node], Tensor]) -> Any:
    """A step on one number a channel."""

    def argument(each: Node) -> Any:
        return value_of(each).detach().double().cpu() if each.op == "placeholder" else value

    args: Any = torch.fx.node.map_arg(node.args, argument)
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, argument)
    return node.target(*args, **kwargs)  # type: ignore[operator]

"""Operator and arguments of a node of an exported graph, and its shapes and numbers for the traced example."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


def operator_of(node: Node) -> str:
    """Name of the operator, without its namespace and the underscore of an in-place form."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].rstrip("_")
    return "getitem" if node.target is operator.getitem else str(getattr(node.target, "__name__", node.target))


def is_cast(node: Node) -> bool:
    """Whether a view reads the same bytes as another dtype."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._overloadname == "dtype"


def argument_of(node: Node, name: str) -> Any:
    """An argument of an operator by name, or its default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for place, argument in enumerate(schema.arguments):
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def place_of(node: Node) -> int:
    """Index of the tuple item that a `getitem` takes."""
    place = node.args[1]
    if not isinstance(place, int):
        raise TypeError(f"{node} takes no place of a tuple")
    return place


def is_tensor(node: Node) -> bool:
    """Whether the value is a tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def has_tensors(node: Node) -> bool:
    """Whether the value is a tensor, or a list of them."""
    return isinstance(node.meta.get("val"), (Tensor, list, tuple))


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a tensor value."""
    return tuple(int(_hint(size)) for size in node.meta["val"].shape)


def number_of(argument: Any) -> Any:
    """The value of a number, which is given as itself or as a node."""
    return _hint(argument.meta.get("val") if isinstance(argument, Node) else argument)


def _hint(value: Any) -> Any:
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value

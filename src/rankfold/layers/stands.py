"""Modules that stand where a residual branch was, so that the code around it runs as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError

BYPASS, CONSTANT = "bypass", "constant"  # kinds of stands


class Bypass(nn.Module):
    """A module that hands its first tensor argument on, whatever else it is given.

    Args:
        items: Whether each item of the output is a tensor, where the module it stands for returns a tuple or list;
            those that are no tensor are None. An empty sequence is an output that is a tensor itself.
        copied: True if it hands on a copy, since code behind it may write into it.
    """

    def __init__(self, items: Sequence[bool] = (), *, copied: bool = False) -> None:
        super().__init__()
        self.items, self.copied = tuple(items), copied

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, as often as the output has tensors."""
        value = _first(args, kwargs)
        return _as_items(value.clone() if self.copied else value, self.items)

    def extra_repr(self) -> str:
        """The items."""
        return f"items={self.items}" if self.items else ""


class Constant(nn.Module):
    """A layer of rank 0: `y = b`, whatever the input.

    The output is `b` as it is, which an addition broadcasts; or, for code that adds in place, as large as the input.

    Attributes:
        bias: The constant `b`, shape (channels,).

    Args:
        channels: Number of channels.
        axes: Number of axes behind that of the channels.
        items: As for `Bypass`.
        full: True if the output is as large as the input.
        device: Device of `b`.
        dtype: dtype of `b`.
    """

    def __init__(
        self,
        channels: int,
        axes: int,
        items: Sequence[bool] = (),
        *,
        full: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.axes, self.items, self.full = axes, tuple(items), full

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The constant, as often as the output has tensors."""
        constant = self.bias.reshape(-1, *[1] * self.axes)
        if self.full:
            constant = constant.expand_as(_first(args, kwargs))
        constant = constant.clone()  # code may write into it
        return _as_items(constant, self.items)

    def of(self, constant: Tensor) -> Constant:
        """The same with another constant, of as many entries."""
        new = Constant(
            len(self.bias), self.axes, self.items, full=self.full, device=self.bias.device, dtype=self.bias.dtype
        )
        with torch.no_grad():
            new.bias.copy_(constant.reshape(-1))
        return new

    def extra_repr(self) -> str:
        """Number of channels, and how the output is shaped."""
        return f"{len(self.bias)}, axes={self.axes}, full={self.full}"


class Always(nn.Module):
    """A layer whose output is one tensor.

    Args:
        value: The tensor.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _inputs: Tensor) -> Tensor:
        """The tensor."""
        return self.value


@dataclass(frozen=True)
class Stand:
    """A module that takes the place of one whose output nobody needs any more. Holds no tensor.

    Attributes:
        kind: "bypass", or "constant" for the module that a branch ends in.
        items: As for `Bypass`.
        channels: Number of channels of a constant.
        axes: Number of axes behind that of the channels.
        full: True for a constant as large as the input.
        copied: True for a bypass that hands on a copy.
    """

    kind: str
    items: tuple[bool, ...] = ()
    channels: int = 0
    axes: int = 0
    full: bool = False
    copied: bool = False

    def to_json(self) -> dict[str, Any]:
        """The stand as a dict; what a kind has no use for is left out."""
        items = {"items": list(self.items)} if self.items else {}
        if self.kind == BYPASS:
            return {"kind": self.kind, **items, "copied": self.copied}
        return {"kind": self.kind, **items, "channels": self.channels, "axes": self.axes, "full": self.full}

    def build(self, like: nn.Module, model: nn.Module) -> nn.Module:
        """The module.

        Args:
            like: The module that it stands for: training mode and, of a constant, device and dtype are its.
            model: The whole model, whose first parameter is taken where that module has none.
        """
        if self.kind == BYPASS:
            return Bypass(self.items, copied=self.copied).train(like.training)
        own = next(like.parameters(), None)
        own = next(model.parameters()) if own is None else own
        new = Constant(self.channels, self.axes, self.items, full=self.full, device=own.device, dtype=own.dtype)
        new.bias.requires_grad_(own.requires_grad)
        return new.train(like.training)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ModelError(
        "a branch that was removed",
        law="the module that was there is called with a tensor",
        got="no tensor among its arguments",
        cure="exclude the branch",
    )


def _as_items(value: Tensor, items: Sequence[bool]) -> Any:
    return tuple(value if tensor else None for tensor in items) if items else value

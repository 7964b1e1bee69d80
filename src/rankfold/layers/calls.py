"""Arguments of the calls of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankfold.layers._base import Adapter


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer that takes one: `layer(x)` and `layer(input=x)` are the same call.

    Args:
        args: Positional arguments, as a hook with `with_kwargs=True` gets them.
        kwargs: Keyword arguments.

    Returns:
        The first positional argument, or else the argument named `input`, as torch names it in linear layers,
        convolutions, norms and `nn.Sequential`; None where there is neither.
    """
    return args[0] if args else kwargs.get("input")


def rows_of(adapter: Adapter, layer: nn.Module, inputs: Tensor) -> int:
    """Number of entries along the axis of samples of a layer's input; 1 for an input that has no such axis."""
    axes = len(adapter.geometry(layer).kernel)
    return inputs.shape[0] if inputs.ndim >= (axes + 2 if axes else 2) else 1

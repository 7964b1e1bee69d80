"""A narrow layer seen from the full-width graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.layers import Geometry, adapter_for


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a layer that is known to have an adapter."""
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{type(layer).__name__} has no adapter")
    return adapter.geometry(layer)


def channel_axis(layer: nn.Module) -> int:
    """The channel axis of a layer's inputs and outputs, counted from the end."""
    return -1 - len(geometry_of(layer).kernel)


def narrowed(value: Tensor, axis: int, kept: Tensor | None) -> Tensor:
    """A value with only the channels that stay."""
    return value if kept is None else value.index_select(axis, kept.to(value.device))


class Widened(nn.Module):
    """Reads the channels that stay, runs the narrow layer, and puts its outputs in their places among zeros.

    Channels that were removed hold zeros, or what later operators make of zeros. No layer reads them: its narrow form
    takes only what stays. So the compressed network is walked on the original's graph, whatever sizes its code holds.

    Args:
        layer: The narrow layer, or its shell.
        original: The original layer.
        kept: Channels of the original layer that stay.
    """

    def __init__(self, layer: nn.Module, original: nn.Module, kept: Kept) -> None:
        super().__init__()
        self.layer = layer
        self._axis, self._kept = channel_axis(original), kept
        self._width = geometry_of(original).outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """The full-width output."""
        output: Tensor = self.layer(narrowed(inputs, self._axis, self._kept.inputs))
        if self._kept.outputs is None:
            return output
        shape = list(output.shape)
        shape[self._axis] = self._width
        index = self._kept.outputs.to(output.device)
        return torch.zeros(shape, dtype=output.dtype, device=output.device).index_copy_(
            self._axis % len(shape), index, output
        )

"""The shell of a linear layer's tensor train: linear layers on parts of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankfold.factors import joined_parts
from rankfold.layers.geometry import Geometry, stage_weight


class TrainLinear(nn.Module):
    """A chain of linear layers, each of which reads one more mode of the input; see `LinearTrainFactors`.

    The input is seen as `n_d × … × n_1`. The first layer reads the last mode wherever the others stand, the next what
    it gives and the mode before, and so on; the last one widens `r_d` to the outputs. Its children are `nn.Linear`.

    Attributes:
        sizes: Sizes of the modes of the input, n_1 to n_d.

    Args:
        sizes: The same.
        layers: The linear layers, first applied first, one more than modes.
    """

    def __init__(self, sizes: Sequence[int], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def forward(self, input: Tensor) -> Tensor:
        """The output, of the shape that the replaced layer's has."""
        first, *middle, last = self.children()
        value: Tensor = first(torch.unflatten(input, -1, self.sizes[::-1]))
        for layer in middle:
            value = layer(value.flatten(-2))
        output: Tensor = last(value)
        return output

    def chain(self) -> list[tuple[Tensor, Geometry, Tensor | None]]:
        """Weight, geometry and bias of two linear layers that compute the same, one after the other."""
        *parts, last = list(self.children())
        rows = joined_parts([stage_weight(part)[0] for part in parts], self.sizes)
        bias = getattr(last, "bias", None)
        output = stage_weight(last)
        first = Geometry(rows.shape[1], rows.shape[0])
        return [(rows[None], first, None), (output, Geometry(len(rows), output.shape[1], bias=bias is not None), bias)]

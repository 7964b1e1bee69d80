"""Transposed convolutions."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.layers._base import Operator, adapts
from rankfold.layers._conv import ConvAdapter, sizes
from rankfold.layers.geometry import Geometry, stage_weight


@adapts(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeAdapter(ConvAdapter):
    """`nn.ConvTranspose1d`, `2d`, `3d` with any stride, padding, output padding, dilation and groups.

    Along each axis, with stride s, padding p and dilation d,

        y[o] = b + Σ_t W[t] x[(o + p − t d) / s]

    over the taps t for which that is a whole number and a place of the input. So an output position is linear in a
    patch of in·k… features, as of a convolution, in which the other taps are zero: which of them are depends on the
    remainder of o by s. The weight is the same at all positions, so least squares over the patches of all, or of some
    drawn evenly, is least squares for the layer. The taps are in the order in which the layer stores them; nothing is
    flipped.

    A call with `output_size` is none that a replacement could take: such a layer is left alone.
    """

    kind = "conv-transpose"
    weight_axes = (1, 0)
    operators: ClassVar[tuple[Operator, ...]] = tuple(
        Operator(f"conv_transpose{axes}d", axis=1, grouped=True) for axes in (1, 2, 3)
    )
    methods: ClassVar[tuple[str, ...]] = ("forward", "_output_padding")

    def geometry(self, layer: nn.Module) -> Geometry:
        """The geometry that the layer's attributes give."""
        own = super().geometry(layer)
        return replace(own, output_padding=sizes(_transposed(layer).output_padding, own.kernel))

    def canonical(self, layer: nn.Module) -> Tensor:
        """(groups, out/groups, in/groups, kernel…), of a weight that is stored in × out/groups × kernel…."""
        return stage_weight(_transposed(layer))

    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Patches gathered by their places in the input, with zeros at taps that meet none of it."""
        geometry = self.geometry(layer)
        if inputs.ndim == len(geometry.kernel) + 1:
            inputs = inputs[None]
        size = tuple(inputs.shape[2:])
        if positions is None:
            positions = torch.arange(prod(geometry.output_size(size)))
        places = _places(geometry, size, positions.to(inputs.device))
        flat = F.pad(inputs.flatten(2), (0, 1))  # the last place is that of no input
        chosen = flat.gather(2, places.flatten().expand(*flat.shape[:2], -1))
        view = torch.unflatten(chosen, 2, places.shape)  # samples × channels × chosen × taps
        view = torch.unflatten(view, 1, (geometry.groups, -1)).permute(1, 0, 3, 2, 4)
        return view.reshape(geometry.groups, len(inputs) * len(positions), geometry.features)

    def resize(self, layer: nn.Module) -> None:
        """Update `in_channels`, `out_channels`, and `groups` of a depthwise one."""
        conv = _transposed(layer)
        inputs, out = conv.weight.shape[:2]
        if conv.groups > 1:
            conv.groups = inputs // (conv.in_channels // conv.groups)
        conv.in_channels, conv.out_channels = inputs, out * conv.groups


def _places(geometry: Geometry, size: tuple[int, ...], positions: Tensor) -> Tensor:
    """Places in a flattened input that the taps meet at some output positions, positions × taps; the number of all
    places where a tap meets none.
    """
    places = positions.new_zeros(len(positions), 1)
    met = torch.ones_like(places, dtype=torch.bool)
    for axis, index in enumerate(torch.unravel_index(positions, geometry.output_size(size))):
        taps = torch.arange(geometry.kernel[axis], device=positions.device) * geometry.dilation[axis]
        steps = index[:, None] + geometry.axis_padding(axis)[0] - taps  # positions × taps of this axis
        here = steps.div(geometry.stride[axis], rounding_mode="floor")
        inside = (here * geometry.stride[axis] == steps) & (here >= 0) & (here < size[axis])
        places = (places[:, :, None] * size[axis] + here[:, None]).flatten(1)
        met = (met[:, :, None] & inside[:, None]).flatten(1)
    return torch.where(met, places, prod(size))


def _transposed(layer: nn.Module) -> nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d:
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        raise TypeError(f"{type(layer).__name__} is no transposed convolution")
    return layer

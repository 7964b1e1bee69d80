"""Convolutions."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.layers._base import Adapter, Operator, adapts
from rankfold.layers.geometry import Geometry


@adapts(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(Adapter):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any stride, padding and mode, dilation and groups."""

    kind = "conv"
    operators: ClassVar[tuple[Operator, ...]] = tuple(
        Operator(f"conv{axes}d", axis=1, grouped=True) for axes in (1, 2, 3)
    )
    methods: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    def geometry(self, layer: nn.Module) -> Geometry:
        """The geometry that the layer's attributes give."""
        conv = _conv(layer)
        kernel = tuple(conv.weight.shape[2:])
        return Geometry(
            conv.in_channels,
            conv.out_channels,
            kernel,
            sizes(conv.stride, kernel),
            conv.padding if isinstance(conv.padding, str) else sizes(conv.padding, kernel),
            sizes(conv.dilation, kernel),
            conv.groups,
            conv.padding_mode,
            conv.bias is not None,
        )

    def canonical(self, layer: nn.Module) -> Tensor:
        """(groups, out/groups, in/groups, kernel…)."""
        conv = _conv(layer)
        return torch.unflatten(conv.weight, 0, (conv.groups, -1))

    def sample_size(self, layer: nn.Module, inputs: Tensor) -> tuple[tuple[int, ...], int]:
        """Spatial size, and the number of samples."""
        axes = len(self.geometry(layer).kernel)
        return tuple(inputs.shape[-axes:]), (inputs.shape[0] if inputs.ndim == axes + 2 else 1)

    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Patches as strided views, or gathered by their places in the padded input where positions are chosen."""
        geometry = self.geometry(layer)
        axes = len(geometry.kernel)
        if inputs.ndim == axes + 1:
            inputs = inputs[None]
        pads = [geometry.axis_padding(i) for i in range(axes)]
        if any(before or after for before, after in pads):
            mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
            inputs = F.pad(inputs, [size for pair in reversed(pads) for size in pair], mode=mode)
        samples = inputs.shape[0]
        if positions is not None:
            places = _places(geometry, inputs.shape[2:], positions.to(inputs.device))
            flat = inputs.flatten(2)
            chosen = flat.gather(2, places.flatten().expand(*flat.shape[:2], -1))
            view = torch.unflatten(chosen, 2, places.shape)  # samples × channels × chosen × taps
            view = torch.unflatten(view, 1, (geometry.groups, -1)).transpose(2, 3)
        else:
            view = inputs
            for i in range(axes):
                reach = geometry.dilation[i] * (geometry.kernel[i] - 1) + 1
                view = view.unfold(2 + i, reach, geometry.stride[i])[..., :: geometry.dilation[i]]
            view = torch.unflatten(view, 1, (geometry.groups, -1))  # samples × groups × in × size… × kernel…
            view = view.movedim(2, 2 + axes).flatten(2, 1 + axes)  # samples × groups × positions × in × kernel…
        return view.transpose(0, 1).reshape(geometry.groups, samples * view.shape[2], geometry.features)

    def outputs(self, layer: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Output pixels."""
        geometry = self.geometry(layer)
        axes = len(geometry.kernel)
        if outputs.ndim == axes + 1:
            outputs = outputs[None]
        flat = torch.unflatten(outputs.flatten(2), 1, (geometry.groups, -1))  # samples × groups × out × positions
        if positions is not None:
            flat = flat[..., positions.to(flat.device)]
        return flat.permute(1, 0, 3, 2).flatten(1, 2)

    def resize(self, layer: nn.Module) -> None:
        """Update `in_channels`, `out_channels`, and `groups` of a depthwise convolution."""
        conv = _conv(layer)
        out, inner = conv.weight.shape[:2]
        if conv.groups > 1:
            conv.groups = out // (conv.out_channels // conv.groups)
        conv.in_channels, conv.out_channels = inner * conv.groups, out


def sizes(value: int | tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A layer's attribute for each axis of a kernel; a bare int, set after the layer was built, is that of all."""
    return (value,) * len(kernel) if isinstance(value, int) else tuple(int(size) for size in value)


def _places(geometry: Geometry, size: torch.Size, positions: Tensor) -> Tensor:
    """Places of the patches of some output positions in a flattened padded input: positions × taps."""
    places = positions.new_zeros(len(positions), 1)
    reaches = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(geometry.dilation, geometry.kernel, strict=True)]
    out = tuple((n - reach) // step + 1 for n, reach, step in zip(size, reaches, geometry.stride, strict=True))
    for axis, index in enumerate(torch.unravel_index(positions, out)):
        taps = torch.arange(geometry.kernel[axis], device=positions.device) * geometry.dilation[axis]
        here = index[:, None] * geometry.stride[axis] + taps  # along this axis alone
        places = (places[:, :, None] * size[axis] + here[:, None]).flatten(1)
    return places


def _conv(layer: nn.Module) -> nn.modules.conv._ConvNd:
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise TypeError(f"{type(layer).__name__} is no convolution")
    return layer

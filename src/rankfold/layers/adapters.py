"""Adapters: a layer kind's canonical weight, geometry and input positions. They know nothing of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.layers.geometry import Geometry, tensor


class Adapter(ABC):
    """One layer kind. Stateless: every method takes the layer."""

    kind: ClassVar[str]
    weight_axes: ClassVar[tuple[int, int]] = (0, 1)
    """Axes of the stored weight that are output and input channels."""

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry:
        """The layer's geometry."""

    @abstractmethod
    def canonical(self, layer: nn.Module) -> Tensor:
        """The weight as groups × out × in × kernel…, a view where possible."""

    @abstractmethod
    def sample_size(self, layer: nn.Module, inputs: Tensor) -> tuple[tuple[int, ...], int]:
        """Spatial size of an input and how many times the layer is applied in it (positions of a linear layer)."""

    @abstractmethod
    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the canonical weight is multiplied with.

        Args:
            layer: The layer.
            inputs: Its input.
            positions: Indices into the flattened positions of one sample (spatial) to keep, or None for all.

        Returns:
            Shape (groups, samples·positions, in·k…).
        """

    @abstractmethod
    def outputs(self, layer: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Outputs in the order of `patches`, shape (groups, samples·positions, out)."""

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias, shape (out,), or None."""
        bias = layer.bias
        return bias if isinstance(bias, Tensor) else None


class LinearAdapter(Adapter):
    """`nn.Linear`, and transformers' `Conv1D`, whose weight is stored in × out."""

    kind = "linear"

    def geometry(self, layer: nn.Module) -> Geometry:
        """No kernel, one group."""
        _, out, inputs = self.canonical(layer).shape
        return Geometry(inputs, out, bias=self.bias(layer) is not None)

    def canonical(self, layer: nn.Module) -> Tensor:
        """(1, out, in)."""
        return tensor(layer, "weight").unsqueeze(0)

    def sample_size(self, layer: nn.Module, inputs: Tensor) -> tuple[tuple[int, ...], int]:
        """A linear layer has no spatial axes; its positions are all axes but the last."""
        return (), inputs.shape[:-1].numel()

    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rows of the input."""
        if inputs.ndim < 3:  # one row, or one row a sample
            inputs = inputs.reshape(-1, 1, inputs.shape[-1])
        return _select(inputs.flatten(1, -2), positions).flatten(0, 1)[None]

    def outputs(self, layer: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rows of the output."""
        return self.patches(layer, outputs, positions)


class TransposedLinearAdapter(LinearAdapter):
    """transformers' `Conv1D`: `y = x W + b` with `W` stored in × out."""

    weight_axes = (1, 0)

    def canonical(self, layer: nn.Module) -> Tensor:
        """(1, out, in), a transposed view."""
        return tensor(layer, "weight").mT.unsqueeze(0)


class ConvAdapter(Adapter):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any stride, padding and mode, dilation and groups."""

    kind = "conv"

    def geometry(self, layer: nn.Module) -> Geometry:
        """Straight from the layer's attributes."""
        conv = _conv(layer)
        kernel = tuple(conv.weight.shape[2:])

        def sizes(value: int | tuple[int, ...]) -> tuple[int, ...]:  # a bare int, set after the layer was built
            return (value,) * len(kernel) if isinstance(value, int) else tuple(int(size) for size in value)

        return Geometry(
            conv.in_channels,
            conv.out_channels,
            kernel,
            sizes(conv.stride),
            conv.padding if isinstance(conv.padding, str) else sizes(conv.padding),
            sizes(conv.dilation),
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
        axes = _conv(layer).weight.ndim - 2
        return tuple(inputs.shape[-axes:]), (inputs.shape[0] if inputs.ndim == axes + 2 else 1)

    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Patches by strided views, or of chosen positions alone by their places in the padded input."""
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
        conv = _conv(layer)
        axes = conv.weight.ndim - 2
        if outputs.ndim == axes + 1:
            outputs = outputs[None]
        flat = torch.unflatten(outputs.flatten(2), 1, (conv.groups, -1))  # samples × groups × out × positions
        if positions is not None:
            flat = flat[..., positions.to(flat.device)]
        return flat.permute(1, 0, 3, 2).flatten(1, 2)


def _places(geometry: Geometry, size: torch.Size, positions: Tensor) -> Tensor:
    """Where the patches of some output positions lie in a flattened padded input: positions × taps."""
    places = positions.new_zeros(len(positions), 1)
    reaches = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(geometry.dilation, geometry.kernel, strict=True)]
    out = tuple((n - reach) // step + 1 for n, reach, step in zip(size, reaches, geometry.stride, strict=True))
    for axis, index in enumerate(torch.unravel_index(positions, out)):
        taps = torch.arange(geometry.kernel[axis], device=positions.device) * geometry.dilation[axis]
        here = index[:, None] * geometry.stride[axis] + taps  # along this axis alone
        places = (places[:, :, None] * size[axis] + here[:, None]).flatten(1)
    return places


def _conv(layer: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"{type(layer).__name__} is no convolution")
    return layer


def _select(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[:, positions.to(rows.device)]


_LINEAR, _TRANSPOSED, _CONV = LinearAdapter(), TransposedLinearAdapter(), ConvAdapter()


def adapter_for(layer: nn.Module) -> Adapter | None:
    """The adapter of a layer; None for a kind that has none, or a subclass that computes something else."""
    if why_no_adapter(layer) is not None:
        return None
    if isinstance(layer, nn.Linear):
        return _LINEAR
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _CONV
    return _TRANSPOSED if is_transformers_conv1d(layer) else None


def why_no_adapter(layer: nn.Module) -> str | None:
    """Why a layer that holds a weight cannot be compressed; None where an adapter serves it."""
    kind = type(layer)
    for base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if not isinstance(layer, base):
            continue
        if kind.forward is not base.forward:
            return f"{kind.__name__} overrides the forward of nn.{base.__name__}"
        if getattr(kind, "_conv_forward", None) is not getattr(base, "_conv_forward", None):
            return f"{kind.__name__} overrides the convolution of nn.{base.__name__}"
        return None
    if is_transformers_conv1d(layer):
        return None
    return f"no adapter for layers of kind {kind.__name__}"


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

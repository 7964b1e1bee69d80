"""Everything about a layer but its weights: enough to build it, count it and cut it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

Padding = str | tuple[int, ...]


def tensor(layer: nn.Module, name: str) -> Tensor:
    """A parameter of a layer by name, known to be there."""
    value = getattr(layer, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(layer).__name__}.{name} is no tensor")
    return value


def stage_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as groups × out × in × kernel…, a view; of a table, whose rows are its inputs, as 1 ×
    entries × rows.
    """
    weight = tensor(layer, "weight")
    if isinstance(layer, nn.Embedding):
        return weight.mT[None]
    groups = getattr(layer, "groups", 1)
    split = torch.unflatten(weight, 0, (groups, -1))
    return split.transpose(1, 2) if isinstance(layer, tuple(_TRANSPOSED.values())) else split


@dataclass(frozen=True)
class Table:
    """The rows of a layer that looks them up, as an embedding does.

    Attributes:
        rows: Number of rows.
        padding_idx: Row that gets no gradient, or None.
        scale_grad_by_freq: True if gradients are divided by how often a row occurs.
        sparse: True if gradients are sparse.
    """

    rows: int
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False


_CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class Geometry:
    """Shape and wiring of a linear layer, a convolution or its transpose, or a layer that looks rows of a table up.

    A table of vectors with d entries is a linear layer behind them, `y = I x` with d × d, whose identity is multiplied
    into the table: what is to be decomposed is that identity, on the vectors as often as they occur.

    Attributes:
        inputs: Number of input channels or features, over all groups.
        outputs: Number of output channels or features, over all groups.
        kernel: Kernel sizes, one per axis; empty for a linear layer.
        stride: Steps, one per axis.
        padding: Paddings, one per axis, or "same" / "valid".
        dilation: Dilations, one per axis.
        groups: Number of groups, each `outputs/groups × inputs/groups`.
        padding_mode: Name of the padding mode in torch.
        bias: True if there is a bias.
        table: The rows that are looked up; None where the input is multiplied.
        output_padding: Positions that a transposed convolution adds at the end of each axis; None for any other layer.
        tied: True if the weight of a linear layer is a table that another layer holds.
        repeats: Times that a linear layer is applied to the parts of one input, as a stage of a train is.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: Padding = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    table: Table | None = None
    output_padding: tuple[int, ...] | None = None
    tied: bool = False
    repeats: int = 1

    @property
    def transposed(self) -> bool:
        """True of a transposed convolution, whose stride sets its inputs apart."""
        return self.output_padding is not None

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Shape of one group's canonical weight, `out × in × kernel…`."""
        return (self.outputs // self.groups, self.inputs // self.groups, *self.kernel)

    @property
    def features(self) -> int:
        """Length of a flattened patch of one group, `in·k…`."""
        return prod(self.canonical_shape[1:])

    @property
    def n_weights(self) -> int:
        """Elements of the weight over all groups, without the bias."""
        if self.table is not None:
            return self.table.rows * self.outputs
        return self.groups * prod(self.canonical_shape)

    @property
    def n_params(self) -> int:
        """Elements of weight and bias; a tied weight is counted where it is held."""
        return (0 if self.tied else self.n_weights) + (self.outputs if self.bias else 0)

    def axis_padding(self, axis: int) -> tuple[int, int]:
        """Padding before and after along one axis, in samples."""
        if self.padding == "valid":
            return 0, 0
        if self.padding == "same":
            total = self.dilation[axis] * (self.kernel[axis] - 1)
            return total // 2, total - total // 2
        size = self.padding[axis]
        return int(size), int(size)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size after this layer.

        Args:
            size: Spatial size before the layer, one int per axis (empty for a linear layer).
        """
        if self.output_padding is not None:
            reach = [self.dilation[i] * (self.kernel[i] - 1) + 1 - sum(self.axis_padding(i)) for i in range(len(size))]
            return tuple((n - 1) * self.stride[i] + reach[i] + self.output_padding[i] for i, n in enumerate(size))
        return tuple(
            (n + sum(self.axis_padding(i)) - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i, n in enumerate(size)
        )

    def macs(self, size: tuple[int, ...]) -> int:
        """Multiply-accumulates of one sample: weights × output positions; the bias, and looking rows up, are free.

        Of a transposed convolution weights × input positions, each of which meets each weight once, padding included.

        Args:
            size: Spatial size of the input (empty for a linear layer: one position).
        """
        if self.table is not None:
            return 0
        return self.n_weights * self.repeats * prod(size if self.transposed else self.output_size(size))

    def build(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The empty `nn.Linear`, `nn.ConvNd`, `nn.ConvTransposeNd` or `nn.Embedding` of this geometry, uninitialised;
        no random numbers are drawn.
        """
        skip_init: Callable[..., nn.Module] = nn.utils.skip_init  # untyped in torch
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.table is not None:
            table = self.table
            return skip_init(
                nn.Embedding,
                table.rows,
                self.outputs,
                padding_idx=table.padding_idx,
                scale_grad_by_freq=table.scale_grad_by_freq,
                sparse=table.sparse,
                **factory,
            )
        if not self.kernel:
            return skip_init(nn.Linear, self.inputs, self.outputs, bias=self.bias, **factory)
        own: dict[str, Any] = {} if self.output_padding is None else {"output_padding": self.output_padding}
        return skip_init(
            (_TRANSPOSED if self.transposed else _CONVS)[len(self.kernel)],
            self.inputs,
            self.outputs,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
            **own,
            **factory,
        )

    def on_axes(self, axes: set[int], *, inputs: int, outputs: int, bias: bool, groups: int | None = None) -> Geometry:
        """A convolution with other widths that does this one's spatial work on `axes` and none on the others.

        It is transposed where this one is and there is such work.

        Args:
            axes: Spatial axes.
            inputs: Number of input channels.
            outputs: Number of output channels.
            bias: True if it has a bias.
            groups: Number of groups, a multiple of this one's, as of a depthwise stage; None is the same number.
        """

        def keep(values: tuple[int, ...], idle: int) -> tuple[int, ...]:
            return tuple(value if i in axes else idle for i, value in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else keep(self.padding, 0)
        busy = isinstance(padding, str) or any(padding)
        return replace(
            self,
            inputs=inputs,
            outputs=outputs,
            kernel=keep(self.kernel, 1),
            stride=keep(self.stride, 1),
            padding=padding,
            dilation=keep(self.dilation, 1),
            groups=self.groups if groups is None else groups,
            bias=bias,
            padding_mode=self.padding_mode if busy else "zeros",
            output_padding=keep(self.output_padding, 0) if self.output_padding is not None and axes else None,
        )

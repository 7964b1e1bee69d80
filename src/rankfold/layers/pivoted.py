"""The shell of factors stored by pivots: standard layers, and the channels that go past them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.factors import Factors, PivotedFactors, Pivots
from rankfold.layers.geometry import Geometry, stage_weight, tensor
from rankfold.linalg.precision import widen

INPUT, CORE, OUTPUT = "input", "core", "output"  # names of the children of a `PivotedLayer`
INDEX_BYTES = 4  # bytes of the index of a channel


class PivotedLayer(nn.Module):
    """A layer whose outer factors are stored by pivots; see `rankfold.factors.PivotedFactors`.

    `z = x_J + input(x_R)`, `v = core(z)`, and `y` is `(v, output(v))` in the order of the channels. Its children are
    standard `nn.Linear` or `nn.ConvNd`; of a transposed convolution `core` is one too, of a table an `nn.Embedding`.
    Without `input`, `z = x`; without `output`, `y = v`.

    Attributes:
        kept: Input channels `J`, shape (groups·r,), int32; None without `input`.
        others: The other input channels `R`, likewise.
        order: Place of each output channel in `(v, output(v))`, shape (out,), int32; None without `output`.

    Args:
        geometry: Geometry of the layer that this one replaces.
        parts: Geometries of the children by name, in their order.
        layers: The children likewise.
    """

    core: nn.Module
    input: nn.Module
    output: nn.Module
    kept: Tensor | None
    others: Tensor | None
    order: Tensor | None

    def __init__(self, geometry: Geometry, parts: Mapping[str, Geometry], layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._geometry, self._parts = geometry, dict(parts)
        self._axis = -1 - len(geometry.kernel)
        pointwise = not geometry.transposed and all(size == 1 for size in geometry.kernel)  # the first takes the steps
        self._steps = geometry.stride if pointwise and any(step > 1 for step in geometry.stride) else ()
        pads = [geometry.axis_padding(axis) for axis in range(len(geometry.kernel))] if pointwise else []
        self._pads = [size for pair in reversed(pads) for size in pair] if any(map(any, pads)) else []
        self._mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        device = tensor(self.core, "weight").device
        rank = 0 if geometry.table is not None else parts[CORE].inputs

        def places(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.register_buffer("kept", places(rank) if INPUT in layers else None)
        self.register_buffer("others", places(geometry.inputs - rank) if INPUT in layers else None)
        self.register_buffer("order", places(geometry.outputs) if OUTPUT in layers else None)

    def forward(self, input: Tensor) -> Tensor:
        """The output, of the shape that the replaced layer's has."""
        value = input
        if self.kept is not None and self.others is not None:
            past = self._sampled(input.index_select(self._axis, self.kept))
            value = past + self.input(input.index_select(self._axis, self.others))
        value = self.core(value)
        if self.order is not None:
            value = torch.cat([value, self.output(value)], self._axis).index_select(self._axis, self.order)
        return value

    def _sampled(self, value: Tensor) -> Tensor:
        """The values at the positions that the child `input` computes."""
        if self._pads:
            value = F.pad(value, self._pads, mode=self._mode)
        if self._steps:
            places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self._steps))
            value = value[places]
        return value

    def fill_(self, groups: Sequence[Factors], bias: Tensor | None) -> None:
        """Copy the indices of the channels from the factors of every group, and the bias.

        The bias of `output` is `b_R − T b_J`, that of `core` `b_J`.

        Args:
            groups: `PivotedFactors`, one per group, whose stages the children have already.
            bias: Bias of the layer, shape (out,), or None where it has none.
        """
        pivots = [(factors.inputs, factors.outputs) for factors in groups if isinstance(factors, PivotedFactors)]
        if self.kept is not None and self.others is not None:
            kept, others = _over_groups([own for own, _ in pivots], self._geometry.inputs)
            self.kept.copy_(kept)
            self.others.copy_(others)
        if self.order is None:
            if bias is not None:
                tensor(self.core, "bias").copy_(bias)
            return
        kept, others = _over_groups([own for _, own in pivots], self._geometry.outputs)
        self.order.copy_(torch.cat([kept, others]).argsort())
        if bias is not None:
            first = widen(bias)[kept]
            tensor(self.core, "bias").copy_(first)
            tensor(self.output, "bias").copy_(widen(bias)[others] - self._through(first))

    def _table(self, layer: nn.Module) -> Tensor:
        """The weight of a pointwise child by group, groups × out × in, in the work dtype."""
        return torch.unflatten(widen(tensor(layer, "weight")).flatten(1), 0, (self._geometry.groups, -1))

    def _through(self, first: Tensor) -> Tensor:
        """`T b` of a bias of `core`, over all groups."""
        own = torch.unflatten(first, 0, (self._geometry.groups, -1))
        return torch.einsum("gor,gr->go", self._table(self.output), own).flatten()

    def chain(self) -> list[tuple[Tensor, Geometry, Tensor | None]]:
        """Weight, geometry and bias of layers without pivots that compute the same, one after the other."""
        ones = [1] * len(self._geometry.kernel)
        core, bias = self._parts[CORE], getattr(self.core, "bias", None)
        parts = [(stage_weight(self.core), replace(core, bias=core.bias and self.order is None), bias)]
        if self.kept is not None and self.others is not None:
            dense = _with_identity(self._table(self.input).mT, self.kept, self.others).mT
            own = replace(self._parts[INPUT], inputs=self._geometry.inputs)
            parts.insert(0, (dense.reshape(*dense.shape, *ones), own, None))
        if self.order is not None:
            kept, others = self.order.argsort().tensor_split([core.outputs])
            dense = _with_identity(self._table(self.output), kept, others)
            if bias is not None:
                rest = widen(tensor(self.output, "bias")) + self._through(widen(bias))
                bias = torch.cat([widen(bias), rest])[self.order.long()]
            own = replace(self._parts[OUTPUT], outputs=self._geometry.outputs)
            parts = [(weight, part, None) for weight, part, _ in parts]
            parts.append((dense.reshape(*dense.shape, *ones), own, bias))
        return parts


def _over_groups(pivots: Sequence[Pivots | None], width: int) -> Pivots:
    """Pivots within each group, as indices over all groups of a layer that is so wide in all."""
    own = [pair for pair in pivots if pair is not None]
    starts = range(0, width, width // len(own))
    kept, others = (torch.cat([pair[side] + start for pair, start in zip(own, starts, strict=True)]) for side in (0, 1))
    return kept, others


def _with_identity(table: Tensor, kept: Tensor, others: Tensor) -> Tensor:
    """The matrices (groups, m, r) with the identity in the rows that are kept, and a table (groups, m − r, r) in the
    others.

    Args:
        table: The table.
        kept: Indices over all groups, shape (groups·r,).
        others: Likewise, shape (groups·(m − r),).
    """
    groups, rest, rank = table.shape
    dense = table.new_zeros(groups * (rest + rank), rank)
    dense[others.long()] = table.flatten(0, 1)
    dense[kept.long()] = torch.eye(rank).to(table).repeat(groups, 1)
    return torch.unflatten(dense, 0, (groups, -1))

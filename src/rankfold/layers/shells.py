"""Shells: the empty replacement of a layer, built of standard `nn` layers from (geometry, form, rank) alone.

A form maps a geometry and a rank to the geometries of the layers that replace it (`forms.py`). Counting, building,
filling and merging all read that one function, so predicted and counted costs cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankfold.factors import Factors, Rank
from rankfold.layers._base import adapter_for
from rankfold.layers.forms import form_of
from rankfold.layers.geometry import Geometry, stage_weight, tensor
from rankfold.layers.pivoted import PivotedLayer
from rankfold.layers.train import TrainLinear


def build_shell(geometry: Geometry, form: str, rank: Rank, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The empty replacement: a plain `nn.Sequential` of `nn` layers, or the form's own module of them."""
    kind = form_of(form)
    built = [stage.build(device=device, dtype=dtype) for stage in kind.stages(geometry, rank)]
    return kind.assemble(geometry, rank, built)


def fill_shell(shell: nn.Module, groups: Sequence[Factors], bias: Tensor | None) -> None:
    """Copy the factors of every group, and the bias, into a shell.

    Args:
        shell: Shell from `build_shell`.
        groups: Factors, one per group, all of one rank.
        bias: Bias, shape (out,), or None where the layer has none: then a bias of the shell is zero.
    """
    with torch.no_grad():
        parts = list(shell.children())
        for index, layer in enumerate(parts):
            weight = stage_weight(layer)
            weight.copy_(torch.cat([factors.stages()[index] for factors in groups]).reshape(weight.shape))
        if isinstance(shell, PivotedLayer):
            shell.fill_(groups, bias)
        elif bias is not None:
            tensor(parts[-1], "bias").copy_(bias)
        elif getattr(parts[-1], "bias", None) is not None:
            tensor(parts[-1], "bias").zero_()


def chain_of(shell: nn.Module) -> list[tuple[Tensor, Geometry, Tensor | None]] | None:
    """Weight by group, geometry and bias of the layers whose product a shell is; None for a module that is no shell.

    Args:
        shell: A module.
    """
    if isinstance(shell, PivotedLayer | TrainLinear):
        return shell.chain()
    parts: list[tuple[Tensor, Geometry, Tensor | None]] = []
    for layer in shell.children():
        adapter = adapter_for(layer)
        if adapter is None:
            return None
        parts.append((stage_weight(layer), adapter.geometry(layer), adapter.bias(layer)))
    return parts or None


def dense_geometry(parts: Sequence[Geometry]) -> Geometry:
    """The geometry of the dense layer that a chain of stages multiplies out to (the inverse of `stages`)."""
    first, last = parts[0], parts[-1]
    if first.table is not None:
        return Geometry(last.outputs, last.outputs, bias=last.bias, table=first.table)
    if not first.kernel:
        return Geometry(first.inputs, last.outputs, bias=last.bias)

    def axis(name: str, idle: int) -> tuple[int, ...]:
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        return tuple(next((value for value in column if value != idle), idle) for column in columns)

    padding = first.padding if isinstance(first.padding, str) else axis("padding", 0)
    modes = [part.padding_mode for part in parts if part.padding_mode != "zeros"]
    more = [part.output_padding for part in parts if part.output_padding is not None]
    return Geometry(
        first.inputs,
        last.outputs,
        axis("kernel", 1),
        axis("stride", 1),
        padding,
        axis("dilation", 1),
        first.groups,
        modes[0] if modes else "zeros",
        last.bias,
        output_padding=tuple(map(max, zip(*more, strict=True))) if more else None,
    )

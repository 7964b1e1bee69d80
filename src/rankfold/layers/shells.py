"""Shells: the empty replacement of a layer, built of standard `nn` layers from (geometry, form, rank) alone.

A form maps a geometry and a rank to the geometries of the layers that replace it. Counting, building, filling and
merging all read that one function, so predicted and counted costs cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.errors import PlanError, near_matches
from rankfold.factors import Factors, Rank
from rankfold.layers.geometry import Geometry, tensor

Stages: TypeAlias = tuple[Geometry, ...]
_FORMS: dict[str, Callable[[Geometry, Rank], Stages]] = {}


def _form(name: str) -> Callable[[Callable[[Geometry, Rank], Stages]], Callable[[Geometry, Rank], Stages]]:
    def decorate(function: Callable[[Geometry, Rank], Stages]) -> Callable[[Geometry, Rank], Stages]:
        _FORMS[name] = function
        return function

    return decorate


def forms() -> list[str]:
    """Names of all forms."""
    return sorted(_FORMS)


def stages(geometry: Geometry, form: str, rank: Rank) -> Stages:
    """Geometries of the layers that replace `geometry`, first applied first; only the last one has a bias.

    Raises:
        PlanError: No such form, or a rank that is no (tuple of) positive int as the form needs it.
    """
    if form not in _FORMS:
        raise PlanError(form, law="a form of factors", got=repr(form), cure=near_matches(form, _FORMS))
    return _FORMS[form](geometry, rank)


@_form("matrix")
def _matrix(geometry: Geometry, rank: Rank) -> Stages:
    axes = set(range(len(geometry.kernel)))
    return _pair(geometry, _single(rank), axes, set())


@_form("mirrored")
def _mirrored(geometry: Geometry, rank: Rank) -> Stages:
    axes = set(range(len(geometry.kernel)))
    return _pair(geometry, _single(rank), set(), axes)


@_form("spatial")
def _spatial(geometry: Geometry, rank: Rank) -> Stages:
    return _pair(geometry, _single(rank), {0}, {1})


@_form("tucker")
def _tucker(geometry: Geometry, rank: Rank) -> Stages:
    if not isinstance(rank, tuple) or len(rank) != 2:
        raise PlanError("rank", law="two ints of at least 1", got=repr(rank), cure="give this form [inner, outer]")
    inner, outer = (_single(part) * geometry.groups for part in rank)
    axes = set(range(len(geometry.kernel)))
    return (
        geometry.on_axes(set(), inputs=geometry.inputs, outputs=inner, bias=False),
        geometry.on_axes(axes, inputs=inner, outputs=outer, bias=False),
        geometry.on_axes(set(), inputs=outer, outputs=geometry.outputs, bias=geometry.bias),
    )


def _pair(geometry: Geometry, rank: int, first: set[int], second: set[int]) -> Stages:
    width = rank * geometry.groups
    return (
        geometry.on_axes(first, inputs=geometry.inputs, outputs=width, bias=False),
        geometry.on_axes(second, inputs=width, outputs=geometry.outputs, bias=geometry.bias),
    )


def _single(rank: Rank) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PlanError("rank", law="one int of at least 1", got=repr(rank), cure="give this form a single rank")
    return rank


def build_shell(
    geometry: Geometry, form: str, rank: Rank, *, device: torch.device, dtype: torch.dtype
) -> nn.Sequential:
    """The empty replacement: a plain `nn.Sequential` of `nn.Linear` / `nn.ConvNd`."""
    return nn.Sequential(*(stage.build(device=device, dtype=dtype) for stage in stages(geometry, form, rank)))


def fill_shell(shell: nn.Sequential, groups: Sequence[Factors], bias: Tensor | None) -> None:
    """Copy the factors of every group, and the bias, into a shell.

    Args:
        shell: From `build_shell`.
        groups: One `Factors` a group, all of one rank.
        bias: Shape (out,), or None where the layer has none.
    """
    with torch.no_grad():
        for index, layer in enumerate(shell):
            weight = tensor(layer, "weight")
            weight.copy_(torch.cat([factors.stages()[index] for factors in groups]).reshape(weight.shape))
        if bias is not None:
            tensor(shell[-1], "bias").copy_(bias)


def dense_geometry(parts: Sequence[Geometry]) -> Geometry:
    """The geometry of the dense layer that a chain of stages multiplies out to (the inverse of `stages`)."""
    first, last = parts[0], parts[-1]
    if not first.kernel:
        return Geometry(first.inputs, last.outputs, bias=last.bias)

    def axis(name: str, idle: int) -> tuple[int, ...]:
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        return tuple(next((value for value in column if value != idle), idle) for column in columns)

    padding = first.padding if isinstance(first.padding, str) else axis("padding", 0)
    modes = [part.padding_mode for part in parts if part.padding_mode != "zeros"]
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
    )

"""Forms: the layers that a factorisation makes of one, as a function from a geometry and a rank to geometries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from rankfold.checks import is_whole
from rankfold.errors import PlanError, near_matches
from rankfold.factors import Rank
from rankfold.layers.geometry import Geometry

Stages: TypeAlias = tuple[Geometry, ...]
Staged: TypeAlias = Callable[[Geometry, Rank], Stages]


def in_sequence(stages: Sequence[nn.Module]) -> nn.Module:
    """A plain `nn.Sequential`."""
    return nn.Sequential(*stages)


@dataclass(frozen=True)
class Form:
    """A form of factors.

    Attributes:
        name: Name of the form in factors and plans.
        stages: Function from a geometry and a rank to the geometries of the layers that replace it, first applied
            first; only the last one has the bias.
        smallest: Function from a geometry to its smallest rank, or to None where the form does not apply.
        assemble: Function that makes one module of the built stages, which are its children in their order.
    """

    name: str
    stages: Staged
    smallest: Callable[[Geometry], Rank | None]
    assemble: Callable[[Sequence[nn.Module]], nn.Module] = in_sequence


_FORMS: dict[str, Form] = {}


def form(
    name: str,
    *,
    smallest: Callable[[Geometry], Rank | None],
    assemble: Callable[[Sequence[nn.Module]], nn.Module] = in_sequence,
) -> Callable[[Staged], Staged]:
    """Register a function as the stages of a form; see `Form`."""

    def register(stages: Staged) -> Staged:
        _FORMS[name] = Form(name, stages, smallest, assemble)
        return stages

    return register


def forms() -> list[str]:
    """Names of all forms."""
    return sorted(_FORMS)


def form_of(name: str) -> Form:
    """A form by name.

    Raises:
        PlanError: No form has the name.
    """
    if name not in _FORMS:
        raise PlanError(name, law="a form of factors", got=repr(name), cure=near_matches(name, _FORMS))
    return _FORMS[name]


def stages(geometry: Geometry, form: str, rank: Rank) -> Stages:
    """Geometries of the layers that replace `geometry`, first applied first; only the last one has a bias.

    Raises:
        PlanError: There is no such form, or the rank is no (tuple of) positive int as the form needs it.
    """
    return form_of(form).stages(geometry, rank)


def _has_kernel(geometry: Geometry) -> bool:
    return any(size > 1 for size in geometry.kernel)


@form("matrix", smallest=lambda geometry: 1)
def _matrix(geometry: Geometry, rank: Rank) -> Stages:
    axes = set(range(len(geometry.kernel)))
    return _pair(geometry, _single(rank), axes, set())


@form("mirrored", smallest=lambda geometry: 1 if _has_kernel(geometry) else None)
def _mirrored(geometry: Geometry, rank: Rank) -> Stages:
    axes = set(range(len(geometry.kernel)))
    return _pair(geometry, _single(rank), set(), axes)


@form("spatial", smallest=lambda geometry: 1 if len(geometry.kernel) == 2 and min(geometry.kernel) > 1 else None)
def _spatial(geometry: Geometry, rank: Rank) -> Stages:
    return _pair(geometry, _single(rank), {0}, {1})


@form("tucker", smallest=lambda geometry: (1, 1) if _has_kernel(geometry) else None)
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
    if not is_whole(rank) or rank < 1:
        raise PlanError("rank", law="one int of at least 1", got=repr(rank), cure="give this form a single rank")
    return rank

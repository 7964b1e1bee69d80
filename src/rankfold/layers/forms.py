"""Forms: the layers that a factorisation makes of one, as a function from a geometry and a rank to geometries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import TypeAlias

from torch import nn

from rankfold.checks import is_whole
from rankfold.errors import PlanError, near_matches
from rankfold.factors import PIVOTABLE, PIVOTED, Rank, factored, pivoted_ends
from rankfold.layers.geometry import Geometry
from rankfold.layers.pivoted import CORE, INDEX_BYTES, INPUT, OUTPUT, PivotedLayer
from rankfold.layers.train import TrainLinear

Stages: TypeAlias = tuple[Geometry, ...]
Staged: TypeAlias = Callable[[Geometry, Rank], Stages]
Assemble: TypeAlias = Callable[[Geometry, Rank, Sequence[nn.Module]], nn.Module]


def in_sequence(geometry: Geometry, rank: Rank, stages: Sequence[nn.Module]) -> nn.Module:
    """A plain `nn.Sequential`."""
    return nn.Sequential(*stages)


def no_bytes(geometry: Geometry, rank: Rank) -> int:
    """What a form adds that has its layers and nothing else."""
    return 0


@dataclass(frozen=True)
class Form:
    """A form of factors.

    Attributes:
        name: Name of the form in factors and plans.
        stages: Function from a geometry and a rank to the geometries of the layers that replace it, first applied
            first; the last one alone has a bias, or several have parts of it.
        smallest: Function from a geometry to its smallest rank, or to None where the form does not apply.
        assemble: Function from a geometry, a rank and the built stages to one module, whose children they are in their
            order.
        extra_bytes: Function from a geometry and a rank to the bytes of what the module holds beside its layers.
        adds_bias: True if the replacement has a bias whether the layer has one or not.
    """

    name: str
    stages: Staged
    smallest: Callable[[Geometry], Rank | None]
    assemble: Assemble = in_sequence
    extra_bytes: Callable[[Geometry, Rank], int] = no_bytes
    adds_bias: bool = False


_FORMS: dict[str, Form] = {}


def form(
    name: str,
    *,
    smallest: Callable[[Geometry], Rank | None],
    assemble: Assemble = in_sequence,
    extra_bytes: Callable[[Geometry, Rank], int] = no_bytes,
    adds_bias: bool = False,
) -> Callable[[Staged], Staged]:
    """Register a function as the stages of a form; see `Form`."""

    def register(stages: Staged) -> Staged:
        _FORMS[name] = Form(name, stages, smallest, assemble, extra_bytes, adds_bias)
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


def serves(form: str, geometry: Geometry) -> bool:
    """Whether a form applies to a layer; a rank that is small enough need not be smaller than the layer."""
    return form_of(form).smallest(geometry) is not None


def stages(geometry: Geometry, form: str, rank: Rank) -> Stages:
    """Geometries of the layers that replace `geometry`, first applied first; see `Form`.

    Raises:
        PlanError: There is no such form, or the rank is no (tuple of) positive int as the form needs it.
    """
    return form_of(form).stages(geometry, rank)


def _has_kernel(geometry: Geometry) -> bool:
    return any(size > 1 for size in geometry.kernel)


@form("matrix", smallest=lambda geometry: 1)
def _matrix(geometry: Geometry, rank: Rank) -> Stages:
    if geometry.table is not None:
        width = _single(rank)
        return replace(geometry, inputs=width, outputs=width), Geometry(width, geometry.outputs, bias=geometry.bias)
    if geometry.tied:  # the last stage has the rows of the table
        width = _single(rank)
        return Geometry(geometry.inputs, width), replace(geometry, inputs=width)
    axes = set(range(len(geometry.kernel)))
    if geometry.transposed and not _has_kernel(geometry) and pivoted_ends("matrix", geometry.canonical_shape)[0]:
        return _pair(geometry, _single(rank), set(), axes)  # its steps are the second stage's: none go past the first
    return _pair(geometry, _single(rank), axes, set())


@form("biased-matrix", smallest=lambda geometry: None if geometry.table or geometry.tied else 1, adds_bias=True)
def _biased(geometry: Geometry, rank: Rank) -> Stages:
    return _matrix(replace(geometry, bias=True), rank)


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


@form("cp", smallest=lambda geometry: 1 if _has_kernel(geometry) else None)
def _cp(geometry: Geometry, rank: Rank) -> Stages:
    width = _single(rank) * geometry.groups
    axes = set(range(len(geometry.kernel)))
    return (
        geometry.on_axes(set(), inputs=geometry.inputs, outputs=width, bias=False),
        geometry.on_axes(axes, inputs=width, outputs=width, bias=False, groups=width),
        geometry.on_axes(set(), inputs=width, outputs=geometry.outputs, bias=geometry.bias),
    )


def _axes(geometry: Geometry) -> list[set[int]]:
    """Axes of the kernel that are longer than 1, one a stage; the others' steps go with the first."""
    busy = [axis for axis, size in enumerate(geometry.kernel) if size > 1]
    idle = set(range(len(geometry.kernel))) - set(busy)
    return [{axis} | (idle if axis == busy[0] else set()) for axis in busy]


def _ones(geometry: Geometry, more: int) -> Rank | None:
    return (1,) * (len(_axes(geometry)) + more) if _has_kernel(geometry) else None


@form("train", smallest=lambda geometry: _ones(geometry, 1))
def _train(geometry: Geometry, rank: Rank) -> Stages:
    axes = _axes(geometry)
    widths = [part * geometry.groups for part in _parts(rank, len(axes) + 1)]
    middle = [
        geometry.on_axes(own, inputs=before, outputs=after, bias=False)
        for own, (before, after) in zip(axes, pairwise(widths), strict=True)
    ]
    return (
        geometry.on_axes(set(), inputs=geometry.inputs, outputs=widths[0], bias=False),
        *middle,
        geometry.on_axes(set(), inputs=widths[-1], outputs=geometry.outputs, bias=geometry.bias),
    )


def _smallest_train(geometry: Geometry) -> Rank | None:
    if geometry.kernel or geometry.table is not None or geometry.tied:
        return None
    modes = len(factored(geometry.inputs, 2))
    return (1,) * modes if modes > 1 else None


def _of_train(geometry: Geometry, rank: Rank, built: Sequence[nn.Module]) -> nn.Module:
    """The module of `linear-train`."""
    return TrainLinear(factored(geometry.inputs, len(built) - 1), built)


@form("linear-train", smallest=_smallest_train, assemble=_of_train)
def _linear_train(geometry: Geometry, rank: Rank) -> Stages:
    modes = len(rank) if isinstance(rank, tuple) else 1
    sizes = factored(geometry.inputs, modes)
    if geometry.kernel or modes < 2 or len(sizes) < modes:
        law = f"two ints or more, one for each of as many factors of {geometry.inputs}"
        raise PlanError("rank", law=law, got=repr(rank), cure="give a linear layer of composite width such a tuple")
    widths = _parts(rank, modes)
    before = (1, *widths)
    stages = [
        Geometry(width * size, after, repeats=prod(sizes[index + 1 :]))
        for index, (width, size, after) in enumerate(zip(before, sizes, widths, strict=False))
    ]
    return (*stages, Geometry(widths[-1], geometry.outputs, bias=geometry.bias))


@form("full-tucker", smallest=lambda geometry: _ones(geometry, 2))
def _full_tucker(geometry: Geometry, rank: Rank) -> Stages:
    axes = _axes(geometry)
    inner, outer, *counts = _parts(rank, len(axes) + 2)
    width, outer = inner * geometry.groups, outer * geometry.groups
    stages = [geometry.on_axes(set(), inputs=geometry.inputs, outputs=width, bias=False)]
    for own, count in zip(axes, counts, strict=True):
        stages.append(geometry.on_axes(own, inputs=width, outputs=width * count, bias=False, groups=width))
        width *= count
    return (
        *stages,
        geometry.on_axes(set(), inputs=width, outputs=outer, bias=False),
        geometry.on_axes(set(), inputs=outer, outputs=geometry.outputs, bias=geometry.bias),
    )


def _parts(rank: Rank, count: int) -> tuple[int, ...]:
    if not isinstance(rank, tuple) or len(rank) != count:
        raise PlanError("rank", law=f"{count} ints of at least 1", got=repr(rank), cure="give this form a tuple")
    return tuple(_single(part) for part in rank)


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


def ends_of(geometry: Geometry, base: str) -> tuple[bool, bool]:
    """Whether the first and the last stage are those stored by pivots, see `pivoted_ends`; of a table the last is."""
    return (False, True) if geometry.table is not None else pivoted_ends(base, geometry.canonical_shape)


def _pivoted(base: str) -> None:
    """Register the form of factors of another form that are stored by pivots; see `PivotedFactors`."""
    plain = form_of(base)

    def parts(geometry: Geometry, rank: Rank) -> dict[str, Geometry]:
        """Geometry of each child of a `PivotedLayer` by its name; what has no weights is left out."""
        first, last = ends_of(geometry, base)
        chain = list(plain.stages(geometry, rank))
        left = {}
        if first:  # the channels that are kept go past the table
            left[INPUT] = replace(chain[0], inputs=geometry.inputs - chain.pop(0).outputs)
        if last:
            table = chain.pop()
            left[OUTPUT] = replace(table, outputs=geometry.outputs - table.inputs)
            chain[-1] = replace(chain[-1], bias=geometry.bias)
        if any(part.inputs < 0 or part.outputs < 0 for part in left.values()):
            raise PlanError(
                "rank", law="no part above the channels of its side", got=repr(rank), cure="choose a smaller rank"
            )
        (core,) = chain
        if first and not left[INPUT].n_weights and not _has_kernel(geometry):  # then the core takes the steps itself
            axes = set(range(len(geometry.kernel)))
            core = geometry.on_axes(axes, inputs=core.inputs, outputs=core.outputs, bias=core.bias)
        left[CORE] = core
        return {name: left[name] for name in (INPUT, CORE, OUTPUT) if name in left and left[name].n_weights}

    def assemble(geometry: Geometry, rank: Rank, built: Sequence[nn.Module]) -> nn.Module:
        own = parts(geometry, rank)
        return PivotedLayer(geometry, own, dict(zip(own, built, strict=True)))

    def extra_bytes(geometry: Geometry, rank: Rank) -> int:
        names = parts(geometry, rank)
        return INDEX_BYTES * (geometry.inputs * (INPUT in names) + geometry.outputs * (OUTPUT in names))

    @form(PIVOTED + base, smallest=plain.smallest, assemble=assemble, extra_bytes=extra_bytes)
    def _stages(geometry: Geometry, rank: Rank) -> Stages:
        return tuple(parts(geometry, rank).values())


for _base in PIVOTABLE:
    _pivoted(_base)

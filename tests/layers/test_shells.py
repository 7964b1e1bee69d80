"""From a geometry, a form and a rank to the layers that replace it, and back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from rankfold.errors import PlanError
from rankfold.factors import PIVOTED, Rank
from rankfold.layers import (
    Geometry,
    PivotedLayer,
    adapter_for,
    build_shell,
    dense_geometry,
    form_of,
    forms,
    serves,
    stages,
)
from rankfold.testing import LAYERS, toy_layer
from rankfold.testing.devices import generator_states, same_states

CONV = Geometry(8, 12, (3, 5), (2, 1), (1, 2), (1, 2), groups=2, padding_mode="reflect", bias=True)


def _larger(rank: Rank | None) -> Rank:
    """A rank above the smallest."""
    assert rank is not None
    return tuple(part + 1 + i for i, part in enumerate(rank)) if isinstance(rank, tuple) else rank + 2


RANKS = {name: _larger(form_of(name).smallest(CONV)) for name in forms() if serves(name, CONV)}


def geometry_of(name: str) -> Geometry:
    layer, _ = toy_layer(name)
    return adapter_for(layer).geometry(layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["matrix", "mirrored", "tucker"])
def test_the_dense_geometry_is_the_inverse_of_the_stages(name: str, form: str) -> None:
    geometry = geometry_of(name)
    if not geometry.kernel and form != "matrix":
        pytest.skip("a linear layer has no kernel to move")
    back = dense_geometry(stages(geometry, form, RANKS[form]))
    busy = (
        geometry.padding_mode
        if any(geometry.axis_padding(i) != (0, 0) for i in range(len(geometry.kernel)))
        else "zeros"
    )
    assert back == Geometry(**{**vars(geometry), "padding_mode": busy})


def test_the_spatial_form_does_one_axis_after_the_other() -> None:
    first, second = stages(CONV, "spatial", 3)
    assert (first.kernel, first.stride, first.padding, first.dilation) == ((3, 1), (2, 1), (1, 0), (1, 1))
    assert (second.kernel, second.stride, second.padding, second.dilation) == ((1, 5), (1, 1), (0, 2), (1, 2))
    assert dense_geometry((first, second)) == CONV


@pytest.mark.parametrize("form", sorted(RANKS))
def test_widths_chain_and_only_the_last_stage_has_a_bias(form: str) -> None:
    if form.startswith(PIVOTED):
        pytest.skip("channels that are kept go past a table, and each output has its bias where it is computed")
    parts = stages(CONV, form, RANKS[form])
    assert (parts[0].inputs, parts[-1].outputs) == (CONV.inputs, CONV.outputs)
    assert all(before.outputs == after.inputs for before, after in pairwise(parts))
    assert [part.bias for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.groups % 2 == 0 for part in parts)


@pytest.mark.parametrize("form", sorted(RANKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_shell_is_built_of_plain_layers_and_draws_nothing(form: str, dtype: torch.dtype) -> None:
    before = generator_states()
    shell = build_shell(CONV, form, RANKS[form], device=torch.device("cpu"), dtype=dtype)
    assert same_states(before, generator_states())
    assert type(shell) is (PivotedLayer if form.startswith(PIVOTED) else nn.Sequential)
    assert {type(layer) for layer in shell.children()} == {nn.Conv2d}
    assert {parameter.dtype for parameter in shell.parameters()} == {dtype}
    assert [adapter_for(layer).geometry(layer) for layer in shell.children()] == list(stages(CONV, form, RANKS[form]))


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, None, "3", (3,), (3, 3, 3)])
@pytest.mark.parametrize("form", sorted(RANKS))
def test_a_rank_the_form_cannot_have_is_refused(form: str, rank: object) -> None:
    if isinstance(rank, tuple) and isinstance(own := RANKS[form], tuple) and len(rank) == len(own):
        rank = (*rank, 3)  # a train through a 2-d kernel has three widths
    with pytest.raises(PlanError, match="rank"):
        stages(CONV, form, rank)  # type: ignore[arg-type]


def test_an_unknown_form_is_refused_with_near_matches() -> None:
    with pytest.raises(PlanError, match="did you mean 'matrix'"):
        stages(CONV, "matrx", 3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_size_is_that_of_the_layer(name: str) -> None:
    layer, inputs = toy_layer(name)
    geometry = geometry_of(name)
    axes = len(geometry.kernel)
    assert geometry.output_size(tuple(inputs.shape[inputs.ndim - axes :])) == tuple(
        layer(inputs).shape[inputs.ndim - axes :]
    )

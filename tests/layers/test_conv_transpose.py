"""Transposed convolutions as a layer kind: against other ways to compute them, for any geometry."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.cost.counted import count
from rankfold.cost.formula import site_cost
from rankfold.decompositions import Decomposition
from rankfold.factors import Factors, MatrixFactors, MirroredFactors, PivotedFactors, SpatialFactors, TuckerFactors
from rankfold.install.merging import merge
from rankfold.layers import Adapter, adapter_for, build_shell, fill_shell, resize, stages
from rankfold.plan import Decision, Plan
from rankfold.registry import lookup
from rankfold.sites.finding import fingerprint
from rankfold.sites.site import Site
from rankfold.testing.matrices import normal

KINDS: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (4, 3, 2)  # of the input, along each axis


def filled(layer: nn.Module) -> nn.Module:
    """A layer in float64 with weights of its own."""
    layer = layer.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=20 + number))
    return layer


def adapter_of(layer: nn.Module) -> Adapter:
    """The adapter of a layer that has one."""
    adapter = adapter_for(layer)
    assert adapter is not None
    return adapter


@st.composite
def layers(draw: st.DrawFn, axes: st.SearchStrategy[int] | None = None) -> nn.Module:
    """A transposed convolution of any geometry that torch takes."""
    count = draw(st.sampled_from([1, 2, 3]) if axes is None else axes)
    sides = [
        (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 3)))
        for _ in range(count)
    ]
    more = [draw(st.integers(0, max(step, apart) - 1)) for _, step, apart, _ in sides]
    padding = [  # an output of at least one position
        min(pad, ((SIZES[i] - 1) * step + apart * (kernel - 1) + more[i]) // 2)
        for i, (kernel, step, apart, pad) in enumerate(sides)
    ]
    groups = draw(st.sampled_from([1, 2]))
    options: dict[str, Any] = {
        "stride": tuple(side[1] for side in sides),
        "padding": tuple(padding),
        "output_padding": tuple(more),
        "dilation": tuple(side[2] for side in sides),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    widths = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    return filled(KINDS[count](*widths, tuple(side[0] for side in sides), **options))


def inputs_of(layer: Any, samples: int = 2) -> Tensor:
    """Inputs of a layer."""
    return normal(samples, layer.in_channels, *SIZES[: layer.weight.ndim - 2], seed=3)


@given(layer=layers())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_weight_times_patches_and_bias_are_the_output_at_every_position(layer: Any) -> None:
    adapter, inputs = adapter_of(layer), inputs_of(layer)
    outputs, geometry = layer(inputs), adapter.geometry(layer)
    found = torch.einsum("gpi,goi->gpo", adapter.patches(layer, inputs), adapter.canonical(layer).flatten(2))
    if layer.bias is not None:
        found = found + layer.bias.reshape(geometry.groups, 1, -1)
    torch.testing.assert_close(found, adapter.outputs(layer, outputs))
    assert geometry.output_size(tuple(inputs.shape[2:])) == outputs.shape[2:]


@given(layer=layers())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_patches_are_those_of_a_convolution_over_the_input_set_apart(layer: Any) -> None:
    """With a flipped kernel: inputs `stride` apart among zeros, `dilation·(k − 1) − padding` zeros around them."""
    inputs, axes = inputs_of(layer), layer.weight.ndim - 2
    apart = inputs.new_zeros(
        *inputs.shape[:2], *((n - 1) * step + 1 for n, step in zip(inputs.shape[2:], layer.stride, strict=True))
    )
    places: Any = (..., *(slice(None, None, step) for step in layer.stride))
    apart[places] = inputs
    around = [layer.dilation[i] * (layer.kernel_size[i] - 1) - layer.padding[i] for i in range(axes)]
    apart = F.pad(
        apart, [size for i in reversed(range(axes)) for size in (around[i], around[i] + layer.output_padding[i])]
    )
    conv: Any = CONVS[axes]
    plain = conv(layer.in_channels, layer.groups, layer.kernel_size, dilation=layer.dilation, groups=layer.groups)
    expected = adapter_of(plain).patches(plain.double(), apart)
    flipped = torch.unflatten(expected, 2, (-1, *layer.kernel_size)).flip(*range(3, 3 + axes)).flatten(2)
    assert torch.equal(adapter_of(layer).patches(layer, inputs), flipped)


def test_outputs_equal_a_sum_over_inputs_and_taps() -> None:
    """`y[o] += W[t] x[i]` for `o = s i − p + d t`: the definition, from the side of the inputs."""
    layer: Any = filled(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=3, output_padding=1, dilation=2, groups=2))
    inputs, adapter = inputs_of(layer), adapter_of(layer)
    (size,) = adapter.geometry(layer).output_size((4,))
    expected = layer.bias[None, :, None].repeat(2, 1, size)
    for i, tap, group in product(range(4), range(3), range(2)):
        place = 2 * i - 3 + 2 * tap
        if 0 <= place < size:
            own = adapter.canonical(layer)[group, :, :, tap]
            expected[:, 3 * group : 3 * group + 3, place] += inputs[:, 2 * group : 2 * group + 2, i] @ own.mT
    torch.testing.assert_close(layer(inputs), expected)


def test_least_squares_over_patches_are_least_squares_of_the_layer() -> None:
    """The weight is shared by all positions, whichever taps each of them meets."""
    layer: Any = filled(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False))
    inputs = inputs_of(layer, samples=5)
    adapter, wanted = adapter_of(layer), normal(*layer(inputs).shape, seed=9)

    def output(weight: Tensor) -> Tensor:
        return F.conv_transpose2d(inputs, weight, stride=2, padding=1, output_padding=1)

    jacobian: Any = torch.func.jacrev(output)(layer.weight)  # type: ignore[no-untyped-call]
    design = jacobian.reshape(wanted.numel(), layer.weight.numel())
    expected = torch.linalg.lstsq(design, wanted.flatten()[:, None]).solution.reshape(layer.weight.shape)
    found = torch.linalg.lstsq(adapter.patches(layer, inputs)[0], adapter.outputs(layer, wanted)[0]).solution
    torch.testing.assert_close(found.mT.reshape(adapter.canonical(layer)[0].shape), expected.transpose(0, 1))


def drawn_factors(form: str, shape: tuple[int, ...], group: int) -> Factors:
    """Factors of a form at rank 2 for a canonical shape."""
    out, inputs, *kernel = shape
    ones, seed = [1] * len(kernel), 100 * group
    if form == "tucker":
        stage = (normal(out, 2, *ones, seed=seed), normal(2, 2, *kernel, seed=seed + 1))
        return TuckerFactors(*stage, normal(2, inputs, *ones, seed=seed + 2))
    first, second = {"matrix": (kernel, ones), "mirrored": (ones, kernel)}.get(
        form, ([*kernel[:1], 1], [1, *kernel[1:]])
    )
    kinds = {"matrix": MatrixFactors, "mirrored": MirroredFactors, "spatial": SpatialFactors}
    return kinds[form](normal(out, 2, *second, seed=seed), normal(2, inputs, *first, seed=seed + 1))


@pytest.mark.parametrize("form", ["matrix", "mirrored", "tucker", "spatial"])
@given(data=st.data())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_every_form_equals_the_layer_of_its_product(form: str, data: st.DataObject) -> None:
    """Outputs, counted cost, kinds of layers, and the layer they are merged to; stored by pivots, too."""
    layer: Any = data.draw(layers(st.just(2) if form == "spatial" else None))
    adapter, inputs = adapter_of(layer), inputs_of(layer)
    geometry = adapter.geometry(layer)
    plain = [drawn_factors(form, geometry.canonical_shape, group) for group in range(geometry.groups)]
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        adapter.canonical(dense).copy_(torch.stack([factors.reconstruct() for factors in plain]))
        expected = dense(inputs)
    narrow = min(geometry.canonical_shape[:2]) < 2  # then two pivots are too many
    for factors in [plain] if form == "spatial" or narrow else [plain, [PivotedFactors(each) for each in plain]]:
        shell = build_shell(geometry, factors[0].form, factors[0].ranks, device=inputs.device, dtype=inputs.dtype)
        fill_shell(shell, factors, layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(shell(inputs), expected)
        site = Site("", (), adapter.kind, geometry, (adapter.sample_size(layer, inputs[:1]),), 8)
        assert count(shell, inputs) == site_cost(site, factors[0].form, factors[0].ranks)
        turned = [part for part in stages(geometry, factors[0].form, factors[0].ranks) if part.transposed]
        assert len(turned) == (2 if form == "spatial" else 1)


@pytest.mark.parametrize("name", ["svd", "whitened-svd", "tucker2", "spatial-svd", "pivoted"])
def test_merged_back_it_is_the_layer_of_its_geometry(name: str) -> None:
    layer: Any = filled(
        nn.ConvTranspose2d(6, 8, 3, stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(1, 2), groups=2)
    )
    method: Decomposition = lookup(name, Decomposition)()
    adapter = adapter_of(layer)
    geometry = adapter.geometry(layer)
    rank = method.ranks(geometry.canonical_shape)[0]
    shell = build_shell(geometry, method.form, rank, device=torch.device("cpu"), dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(shell.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    plan = Plan((Decision("", method, rank),), (), fingerprint(layer))
    merged = merge(shell, plan)
    assert adapter_of(merged).geometry(merged) == geometry


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_that_was_cut_names_its_sizes(groups: int) -> None:
    layer: Any = filled(nn.ConvTranspose2d(4, 4, 3, groups=groups, bias=False))
    layer.weight = nn.Parameter(layer.weight[:2].detach().clone())
    resize(layer)
    assert (layer.in_channels, layer.out_channels, layer.groups) == ((2, 4, 1) if groups == 1 else (2, 2, 2))
    assert layer(normal(1, 2, 3, 3, seed=1)).shape == (1, layer.out_channels, 5, 5)


def test_a_bare_int_set_later_is_that_of_every_axis() -> None:
    layer: Any = nn.ConvTranspose2d(3, 4, 3)
    layer.stride, layer.padding, layer.output_padding, layer.dilation = 2, 1, 1, 1
    built = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)
    assert adapter_of(layer).geometry(layer) == adapter_of(built).geometry(built)

"""Patches times the canonical weight are the layer's output, for every geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.layers import adapter_for, why_no_adapter
from rankfold.testing import LAYERS, toy_layer
from rankfold.testing.matrices import normal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_canonical_weight_are_the_output(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    geometry = adapter.geometry(layer)
    weight = adapter.canonical(layer)
    patches = adapter.patches(layer, inputs)
    expected = adapter.outputs(layer, layer(inputs) - adapter.bias(layer).reshape(_along_channels(layer)))
    assert weight.shape == (geometry.groups, *geometry.canonical_shape)
    assert patches.shape == (*expected.shape[:2], geometry.features)
    torch.testing.assert_close(torch.einsum("gpi,goi->gpo", patches, weight.flatten(2)), expected)


def _along_channels(layer: nn.Module) -> list[int]:
    return [-1] + [1] * len(getattr(layer, "kernel_size", ()))


@pytest.mark.parametrize("name", LAYERS)
def test_chosen_positions_are_a_part_of_all(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    outputs = layer(inputs)
    geometry = adapter.geometry(layer)
    samples = len(inputs)
    positions = adapter.patches(layer, inputs).shape[1] // samples
    index = torch.arange(positions)[::2]
    for read, tensor in ((adapter.patches, inputs), (adapter.outputs, outputs)):
        every = read(layer, tensor)
        some = read(layer, tensor, index)
        expected = every.unflatten(1, (samples, positions))[:, :, index].flatten(1, 2)
        assert torch.equal(some, expected)
    assert geometry.output_size(adapter.sample_size(layer, inputs)[0]) == (outputs.shape[2:] if geometry.kernel else ())


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_those_of_the_layer_in_the_order_of_the_patches(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    outputs = layer(inputs)
    found = adapter.outputs(layer, outputs)
    groups = adapter.geometry(layer).groups
    flat = outputs.flatten(0, -2) if not adapter.geometry(layer).kernel else outputs.flatten(2).mT.flatten(0, 1)
    assert torch.equal(found.permute(1, 0, 2).flatten(1), flat)
    assert found.shape[0] == groups


@pytest.mark.parametrize("name", LAYERS)
def test_macs_of_a_sample_equal_torch_s_own_count(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    size, times = adapter.sample_size(layer, inputs)
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    assert times * adapter.geometry(layer).macs(size) == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", LAYERS)
def test_the_geometry_builds_the_layer_again(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    geometry = adapter.geometry(layer)
    again = geometry.build(device=torch.device("cpu"), dtype=torch.float64)
    with torch.no_grad():
        adapter_for(again).canonical(again).copy_(adapter.canonical(layer))
        again.bias.copy_(layer.bias)
    torch.testing.assert_close(again(inputs), layer(inputs))
    assert adapter_for(again).geometry(again) == geometry
    assert geometry.n_params == sum(parameter.numel() for parameter in layer.parameters())


def test_conv_patches_equal_torch_s_unfold() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)).double()
    images = normal(3, 4, 9, 8, seed=1)
    expected = F.unfold(images, (3, 2), dilation=(2, 1), padding=(2, 1), stride=(1, 2))
    assert torch.equal(adapter_for(conv).patches(conv, images)[0], expected.mT.flatten(0, 1))


@pytest.mark.parametrize(
    "name", ["linear", "conv2d grouped", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d grouped"]
)
def test_an_input_without_batch_axis_is_one_sample(name: str) -> None:
    layer, inputs = toy_layer(name)
    adapter = adapter_for(layer)
    single = inputs[0]
    assert torch.equal(adapter.patches(layer, single), adapter.patches(layer, inputs[:1]))
    assert torch.equal(adapter.outputs(layer, layer(single)), adapter.outputs(layer, layer(inputs[:1])))
    assert adapter.sample_size(layer, single) == adapter.sample_size(layer, inputs[:1])


@pytest.mark.parametrize("name", LAYERS)
def test_the_canonical_weight_is_a_view(name: str) -> None:
    layer, _ = toy_layer(name)
    canonical = adapter_for(layer).canonical(layer)
    assert canonical.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


class Doubled(nn.Linear):
    """Computes something else than a linear layer."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


class Standardised(nn.Conv2d):
    """Computes with another weight than its own."""

    def _conv_forward(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(inputs, weight - weight.mean(), bias)


class Halved(nn.ConvTranspose2d):
    """Computes something else than a transposed convolution."""

    def forward(self, inputs: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return super().forward(inputs, output_size) / 2


class Fixed(nn.ConvTranspose2d):
    """Adds positions of its own."""

    def _output_padding(self, *args: Any, **options: Any) -> list[int]:
        return [0, 0]


class Renamed(nn.Linear):
    """Is a linear layer under another name."""


def test_subclasses_are_served_where_they_compute_the_same() -> None:
    assert adapter_for(Renamed(3, 2)) is not None
    assert why_no_adapter(Renamed(3, 2)) is None
    for layer, reason in (
        (Doubled(3, 2), "Doubled overrides the forward of nn.Linear"),
        (Standardised(3, 2, 3), "Standardised overrides the convolution of nn.Conv2d"),
        (Halved(3, 2, 3), "Halved overrides the forward of nn.ConvTranspose2d"),
        (Fixed(3, 2, 3), "Fixed overrides the output padding of nn.ConvTranspose2d"),
        (nn.Bilinear(3, 2, 3), "no adapter for layers of kind Bilinear"),
        (nn.EmbeddingBag(3, 2), "no adapter for layers of kind EmbeddingBag"),
    ):
        assert adapter_for(layer) is None
        assert why_no_adapter(layer) == reason

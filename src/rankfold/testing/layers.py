"""Toy layers of every kind and geometry that has an adapter, with inputs for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.testing.matrices import normal

_Build = Callable[[bool], nn.Module]


def _conv(kind: Callable[..., nn.Module], *args: Any, **options: Any) -> _Build:
    return lambda bias: kind(*args, bias=bias, **options)


def _transformers_conv1d(_bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(12, 20)
    return layer


_LAYERS: dict[str, tuple[_Build, tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(20, 12, bias=bias), (40, 20)),
    "linear on tokens": (lambda bias: nn.Linear(12, 20, bias=bias), (4, 9, 12)),
    "conv1d": (_conv(nn.Conv1d, 6, 8, 3, padding=1), (3, 6, 17)),
    "conv1d strided, dilated": (_conv(nn.Conv1d, 6, 8, 3, stride=2, dilation=2, padding=3), (3, 6, 17)),
    "conv1d grouped, circular": (_conv(nn.Conv1d, 6, 8, 5, padding=2, groups=2, padding_mode="circular"), (3, 6, 17)),
    "conv2d": (_conv(nn.Conv2d, 4, 10, 3), (2, 4, 9, 8)),
    "conv2d pointwise, strided": (_conv(nn.Conv2d, 8, 10, 1, stride=2), (2, 8, 9, 8)),
    "conv2d oblong": (_conv(nn.Conv2d, 4, 10, (3, 5), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), (2, 4, 11, 13)),
    "conv2d grouped": (_conv(nn.Conv2d, 8, 12, 3, padding=1, groups=4), (2, 8, 7, 6)),
    "conv2d depthwise": (_conv(nn.Conv2d, 6, 6, 3, padding=1, groups=6), (2, 6, 7, 6)),
    "conv2d same": (_conv(nn.Conv2d, 4, 6, 3, padding="same", dilation=2), (2, 4, 8, 7)),
    "conv2d same, even kernel": (_conv(nn.Conv2d, 4, 6, (4, 2), padding="same"), (2, 4, 8, 7)),
    "conv2d same, reflect": (_conv(nn.Conv2d, 4, 6, (3, 5), padding="same", padding_mode="reflect"), (2, 4, 8, 7)),
    "conv2d valid": (_conv(nn.Conv2d, 4, 6, 3, padding="valid", stride=2), (2, 4, 8, 7)),
    "conv2d reflect": (_conv(nn.Conv2d, 4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 8, 7)),
    "conv2d replicate": (_conv(nn.Conv2d, 4, 6, 3, padding=1, stride=2, padding_mode="replicate"), (2, 4, 8, 7)),
    "conv2d circular": (_conv(nn.Conv2d, 4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 8, 7)),
    "conv3d": (_conv(nn.Conv3d, 3, 5, (2, 3, 2), stride=(1, 2, 1), padding=1), (2, 3, 5, 6, 5)),
    "conv3d grouped, dilated": (_conv(nn.Conv3d, 4, 6, 2, dilation=2, groups=2), (2, 4, 5, 6, 5)),
    "conv3d same, replicate": (_conv(nn.Conv3d, 3, 5, 3, padding="same", padding_mode="replicate"), (2, 3, 4, 5, 4)),
    "conv_transpose1d": (_conv(nn.ConvTranspose1d, 6, 8, 4, stride=2, padding=1), (3, 6, 9)),
    "conv_transpose1d grouped, dilated": (
        _conv(nn.ConvTranspose1d, 6, 8, 3, stride=3, padding=2, output_padding=1, dilation=2, groups=2),
        (3, 6, 7),
    ),
    "conv_transpose2d": (_conv(nn.ConvTranspose2d, 6, 8, 4, stride=2, padding=1), (2, 6, 5, 4)),
    "conv_transpose2d unstrided": (_conv(nn.ConvTranspose2d, 4, 6, 3), (2, 4, 5, 4)),
    "conv_transpose2d oblong": (
        _conv(nn.ConvTranspose2d, 4, 10, (3, 5), stride=(2, 1), padding=(2, 1), output_padding=(1, 0), dilation=(1, 2)),
        (2, 4, 6, 7),
    ),
    "conv_transpose2d gaps": (_conv(nn.ConvTranspose2d, 4, 6, 2, stride=3, output_padding=2), (2, 4, 3, 4)),
    "conv_transpose2d grouped": (
        _conv(nn.ConvTranspose2d, 8, 12, 3, stride=2, padding=1, output_padding=1, groups=4),
        (2, 8, 4, 3),
    ),
    "conv_transpose2d depthwise": (_conv(nn.ConvTranspose2d, 6, 6, 4, stride=2, padding=1, groups=6), (2, 6, 4, 5)),
    "conv_transpose2d pointwise": (_conv(nn.ConvTranspose2d, 8, 10, 1, stride=2, output_padding=1), (2, 8, 4, 5)),
    "conv_transpose2d pointwise, narrowing": (
        _conv(nn.ConvTranspose2d, 10, 8, 1, stride=(2, 1), padding=(1, 0)),
        (2, 10, 4, 5),
    ),
    "conv_transpose3d": (
        _conv(nn.ConvTranspose3d, 3, 5, (2, 3, 2), stride=(1, 2, 1), padding=1, output_padding=(0, 1, 0)),
        (2, 3, 4, 3, 4),
    ),
    "conv_transpose3d grouped, dilated": (
        _conv(nn.ConvTranspose3d, 4, 6, 2, stride=2, dilation=2, groups=2),
        (2, 4, 2, 3, 2),
    ),
}
if importlib.util.find_spec("transformers") is not None:
    _LAYERS["transformers Conv1D"] = (_transformers_conv1d, (4, 9, 20))

ALWAYS_BIASED = frozenset({"transformers Conv1D"})
"""Names of the layers that cannot be without a bias."""

LAYERS: tuple[str, ...] = tuple(_LAYERS)
"""Names of the toy layers; transformers' `Conv1D` is among them where transformers is installed."""


def toy_layer(
    name: str, *, bias: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[nn.Module, Tensor]:
    """A layer and a batch of inputs for it, the same numbers every time.

    Args:
        name: Name of the layer, one of `LAYERS`.
        bias: True if the layer has a bias; not read by those of `ALWAYS_BIASED`.
        dtype: Dtype of the layer and the inputs.
        device: Device of the layer and the inputs.

    Returns:
        The layer in eval mode, and its inputs.
    """
    build, size = _LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layer = build(bias)
    return layer.to(device=device, dtype=dtype).eval(), normal(*size, seed=8, device=device).to(dtype)

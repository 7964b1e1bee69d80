"""Modules that are no sites and carry channels of sites: norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankfold.layers._base import adapter_for


@dataclass(frozen=True)
class Carrier:
    """A kind of modules that carry channels.

    Attributes:
        kinds: Types of the modules.
        tensors: Names of the tensors whose first axis is the channels; all of them keep the same.
        resize: Function that makes the attributes that name sizes agree with tensors that were cut.
    """

    kinds: tuple[type[nn.Module], ...]
    tensors: tuple[str, ...]
    resize: Callable[[Any], None]


def _batch_norm(module: Any) -> None:
    module.num_features = len(module.weight if module.running_mean is None else module.running_mean)


def _group_norm(module: Any) -> None:
    count = len(module.weight)
    module.num_groups, module.num_channels = module.num_groups * count // module.num_channels, count


CARRIERS = [
    Carrier((nn.modules.batchnorm._BatchNorm,), ("weight", "bias", "running_mean", "running_var"), _batch_norm),
    Carrier((nn.GroupNorm,), ("weight", "bias"), _group_norm),
]


def carrier_of(module: nn.Module) -> Carrier | None:
    """The kind of carrier that a module is; None if it is none."""
    return next((carrier for carrier in CARRIERS if isinstance(module, carrier.kinds)), None)


def resize(module: nn.Module) -> None:
    """Make the attributes of a layer, norm or embedding that name sizes agree with tensors that were cut."""
    adapter, carrier = adapter_for(module), carrier_of(module)
    if adapter is not None:
        adapter.resize(module)
    elif carrier is not None:
        carrier.resize(module)


def places_of(module: nn.Module) -> dict[str, int]:
    """Axes of the output channels of a module's tensors, by name of the tensor; all of these keep the same channels."""
    adapter, carrier = adapter_for(module), carrier_of(module)
    if adapter is not None:
        depthwise = getattr(module, "groups", 1) > 1  # then the weight's first axis is that of both
        return {"weight": 0 if depthwise else adapter.weight_axes[0], "bias": 0}
    return {} if carrier is None else dict.fromkeys(carrier.tensors, 0)

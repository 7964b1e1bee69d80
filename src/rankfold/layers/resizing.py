"""Sizes that layers keep as attributes, after their tensors were cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankfold.layers.adapters import is_transformers_conv1d


def resize(module: Any) -> None:
    """Make the attributes that say sizes agree with the tensors."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        out, inner = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = out // (module.out_channels // module.groups)
        module.in_channels, module.out_channels = inner * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        kept = module.weight if module.running_mean is None else module.running_mean
        module.num_features = len(kept)
    elif isinstance(module, nn.GroupNorm):
        count = len(module.weight)
        module.num_groups, module.num_channels = module.num_groups * count // module.num_channels, count
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif is_transformers_conv1d(module):
        module.nx, module.nf = module.weight.shape

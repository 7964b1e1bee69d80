"""Numbers of heads, and widths made of them, that attention modules keep as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rankfold.channels.groups import ChannelGroup

HEADS = (
    *("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_heads", "n_local_kv_heads"),
    *("split_size", "all_head_size", "inner_dim", "attn_dim", "kv_dim", "q_size", "kv_size"),  # widths of all heads
)
EMBEDDINGS = ("embed_dim", "hidden_size", "d_model", "dim")  # widths of the stream in most modules, of heads in some


def with_attributes(model: nn.Module, group: ChannelGroup, names: Sequence[str]) -> ChannelGroup:
    """A group of heads with the numbers that the modules around its layers keep about them.

    Args:
        model: The original model.
        group: Channel group; one without attention stays as it is.
        names: Names of attributes to look for; values that are whole multiples of the group's units shrink along.
    """
    if not any(group.macs):
        return group
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, int]] = {}
    for path in (*group.made, *group.read):
        parent = path.rpartition(".")[0]
        kept = {name: value for name, value in vars(modules[parent]).items() if name in names and type(value) is int}
        whole = {name: value for name, value in kept.items() if value > 0 and value % group.units == 0}
        if whole:
            found[parent] = whole
    return replace(group, attributes=found)

"""`nn.MultiheadAttention` taken apart into linear layers, which can be compressed and lose heads."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError
from rankfold.layers.geometry import Geometry, tensor


class SplitAttention(nn.Module):
    """An `nn.MultiheadAttention` in eval mode, as linear layers for queries, keys, values and outputs.

    It computes `softmax(QKᵀ/√d + mask) V` head by head, by the fused operator. It takes the arguments of the module it
    replaces and returns a pair whose second item, the weights of attention, is always None.

    Args:
        original: The module to replace.

    Raises:
        ModelError: The module appends keys or values of its own (`add_bias_kv`, `add_zero_attn`).
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if original.bias_k is not None or original.add_zero_attn:
            raise ModelError(
                "nn.MultiheadAttention",
                law="keys and values come from the inputs alone",
                got="add_bias_kv or add_zero_attn",
                cure="leave this module as it is",
            )
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.batch_first = original.batch_first
        width = original.embed_dim
        packed = original._qkv_same_embed_dim
        own = [original.q_proj_weight, original.k_proj_weight, original.v_proj_weight]
        rows = [slice(part * width, (part + 1) * width) for part in range(3)]
        self.q, self.k, self.v = (
            _linear(
                original.in_proj_weight if packed else weight, original.in_proj_bias, part if packed else None, part
            )
            for weight, part in zip(own, rows, strict=True)
        )
        self.out = _linear(original.out_proj.weight, original.out_proj.bias)
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Same as `nn.MultiheadAttention.forward`; the second of the pair is always None."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        q, k, v = (
            layer(each).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, each in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _mask(attn_mask, key_padding_mask, q)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return (result[0] if not batched else result if self.batch_first else result.transpose(0, 1)), None


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Both masks as one term to add to the products; True in a mask of bools means "not allowed"."""
    parts = []
    if attn_mask is not None:
        by_head = attn_mask.ndim == 3
        parts.append(
            torch.unflatten(_added(attn_mask, like), 0, (len(like), -1)) if by_head else _added(attn_mask, like)
        )
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None]
        parts.append(_added(padding, like)[:, None, None])
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None, rows: slice | None = None, entries: slice | None = None) -> nn.Module:
    """A linear layer of some rows of a weight and some entries of a bias, each trained if its source is."""
    part = weight.detach()[rows or slice(None)]
    geometry = Geometry(part.shape[1], part.shape[0], bias=bias is not None)
    layer = geometry.build(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        tensor(layer, "weight").copy_(part).requires_grad_(weight.requires_grad)
        if bias is not None:
            tensor(layer, "bias").copy_(bias[entries or slice(None)]).requires_grad_(bias.requires_grad)
    return layer


def split_attention(model: nn.Module) -> nn.Module:
    """A copy of a model in which every `nn.MultiheadAttention` is a `SplitAttention` of the same weights.

    `nn.MultiheadAttention` holds its projections as bare parameters, and the size of its heads follows from the size
    of its inputs: none of its layers can be compressed, and no head can be removed. The copy computes the same and can
    be compressed; a checkpoint of it is loaded with `factory=lambda: rankfold.split_attention(build())`. Modules that
    look into their attention's parameters (`nn.TransformerEncoderLayer` does) cannot use the copy's and are left as
    they are, with their attention.

    Args:
        model: Model, left untouched.

    Raises:
        ModelError: `model` is no module, or an attention appends keys or values of its own.
    """
    if not isinstance(model, nn.Module):
        raise ModelError("model", law="an nn.Module", got=type(model).__name__, cure="pass the module itself")
    result = copy.deepcopy(model)
    if type(result) is nn.MultiheadAttention:
        return SplitAttention(result)
    split: dict[int, SplitAttention] = {}  # one for a module that stands in several places
    for parent in list(result.modules()):
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            continue
        for name, child in list(parent._modules.items()):
            if type(child) is nn.MultiheadAttention:  # a subclass may compute something else
                if id(child) not in split:
                    split[id(child)] = SplitAttention(child)
                setattr(parent, name, split[id(child)])
    return result

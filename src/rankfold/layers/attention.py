"""`nn.MultiheadAttention` taken apart into linear layers, which can be compressed and lose heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError
from rankfold.layers.geometry import Geometry, tensor


class SplitAttention(nn.Module):
    """An `nn.MultiheadAttention` as linear layers for queries, keys, values and outputs.

    It computes `softmax(QKᵀ/√d + mask) V` head by head, by the fused operator; in training mode it drops weights of
    attention as the original does. It takes the arguments of the module it replaces and returns a pair whose second
    item, the weights of attention, is always None.

    Args:
        original: The module to replace.

    Raises:
        ModelError: The module appends keys or values of its own (`add_bias_kv`, `add_zero_attn`).
    """

    # `nn.TransformerEncoderLayer` reads these, and keeps off its fused kernel, which would read packed weights.
    in_proj_bias: Tensor | None = None
    _qkv_same_embed_dim = False
    dropout = 0.0

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
        self.embed_dim, self.batch_first = original.embed_dim, original.batch_first
        self.dropout = original.dropout
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
        """Same as `nn.MultiheadAttention.forward`, where `is_causal` is but a hint on what `attn_mask` says; the second
        of the pair is always None.
        """
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
        dropped = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropped)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return (result[0] if not batched else result if self.batch_first else result.transpose(0, 1)), None


def packed(split: SplitAttention) -> nn.MultiheadAttention | None:
    """The `nn.MultiheadAttention` that computes the same; None where a part is no plain linear layer of its full size.

    Args:
        split: The split attention, left untouched; no tensor is shared with it.
    """
    width, parts = split.embed_dim, [split.q, split.k, split.v, split.out]
    layers = [part for part in parts if type(part) is nn.Linear and part.out_features == width]
    if len(layers) < len(parts) or split.num_heads * split.head_dim != width:
        return None
    q, k, v, out = layers
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    if (q.in_features, out.in_features) != (width, width) or len(biases) not in (0, len(layers)):
        return None
    module = nn.MultiheadAttention(
        width,
        split.num_heads,
        split.dropout,
        bias=bool(biases),
        kdim=k.in_features,
        vdim=v.in_features,
        batch_first=split.batch_first,
        device="meta",
        dtype=q.weight.dtype,
    )
    own: dict[str, list[Tensor]] = {
        "q_proj_weight": [q.weight],
        "k_proj_weight": [k.weight],
        "v_proj_weight": [v.weight],
    }
    if module._qkv_same_embed_dim:
        own = {"in_proj_weight": [q.weight, k.weight, v.weight]}
    if biases:
        own["in_proj_bias"] = biases[:3]
    for name, sources in own.items():
        trained = any(source.requires_grad for source in sources)
        setattr(module, name, nn.Parameter(torch.cat([source.detach() for source in sources]), requires_grad=trained))
    for name, source in out.named_parameters():
        copied = nn.Parameter(source.detach().clone(), requires_grad=source.requires_grad)
        setattr(module.out_proj, name, copied)
    return module.train(split.training)


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

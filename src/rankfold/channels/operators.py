"""Operators of a graph by what they do to channels."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

from rankfold.graph.nodes import argument_of, is_tensor, operator_of, shape_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    "relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu mish softplus erf relu6 clone contiguous"
    " dropout alias detach _to_copy to type_as neg exp log sqrt rsqrt pow abs clamp clamp_min clamp_max reciprocal sin"
    " cos add sub rsub mul div maximum minimum where square lift_fresh_copy feature_dropout alpha_dropout masked_fill"
    " selu celu log_sigmoid softshrink hardshrink tanhshrink lerp addcmul log1p expm1 sign nan_to_num"
    " lt le gt ge eq ne logical_not logical_and logical_or bitwise_not bitwise_and bitwise_or"
)
LAYOUT = _names(
    "view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze expand repeat slice select"
    " narrow split split_with_sizes chunk unbind cat stack flip movedim pixel_shuffle channel_shuffle"
    " native_channel_shuffle repeat_interleave swapaxes"  # not roll: a cut changes which channels it moves to a place
)
SPATIAL = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d"
    " max_pool2d max_pool3d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_nearest1d"
    " upsample_bicubic2d max_pool2d_with_indices"
)
REDUCTIONS = _names("mean sum amax amin")
SOFTMAX = _names("softmax _softmax log_softmax _log_softmax")
BATCH_NORMS = _names("batch_norm _native_batch_norm_legit_no_training")
CONSTANT = _names("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor")


def flat_sources(node: Any, axis: int) -> list[Node] | None:
    """The constants behind a value that is the same all along an axis (counted from the end); None where it is not."""
    shape = shape_of(node) if isinstance(node, Node) and is_tensor(node) else ()
    if len(shape) < -axis or shape[axis] == 1:
        return []
    if operator_of(node) in CONSTANT:
        return [node]
    if operator_of(node) == "expand":  # from one to all heads
        behind = flat_sources(node.args[0], axis)
        return behind if behind is None else behind or [node]
    if operator_of(node) not in ELEMENTWISE:
        return None
    parts = [flat_sources(each, axis) for each in node.all_input_nodes]
    return None if any(each is None for each in parts) else [source for each in parts for source in each or ()]


def one_slope(node: Node) -> bool:
    """Whether a PReLU has one slope for all channels."""
    slope = argument_of(node, "weight")
    return isinstance(slope, Node) and prod(shape_of(slope)) == 1

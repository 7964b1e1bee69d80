"""Which operators multiply matrices, and how many multiply-accumulates those do that torch's own counter leaves out.

An operator is *counted* if torch has a formula for it (`torch.utils.flop_counter`: `mm`, `addmm`, `bmm`, `baddbmm`,
convolutions of every kind, attention; and what a user registers with `register_flop_formula`), or there is one here. It
is *missed* if it multiplies matrices or convolves by its own definition (`PRODUCTS`) and has no formula, or if it is no
operator of torch, so that nothing is known of it. Everything else does no product of matrices: element-wise arithmetic,
sums, norms, pooling, interpolation, look-ups, sorting; Fourier transforms and the factorisations and solvers of
`torch.linalg` do other work than multiply-accumulates with a weight, and count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import torch

Shape: TypeAlias = Sequence[int]

# Of torch's operators, those that are or contain a product of matrices or a convolution and that no formula covers.
# They are what remains of `linear`, `matmul`, `conv…` and `lstm` on packed, sparse, low-precision or fused tensors.
PRODUCTS = frozenset(
    {
        "_addmm_activation",
        "_conv_depthwise2d",
        "_cslt_sparse_mm",
        "_dyn_quant_matmul_4bit",
        "_flash_attention_forward_no_dropout_inplace",
        "_foreach_mm",
        "_lstm_mps",
        "_mixed_dtypes_linear",
        "_mps_convolution",
        "_mps_convolution_transpose",
        "_native_multi_head_attention",
        "_nnpack_spatial_convolution",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_grouped_mm",
        "_scaled_grouped_mm_v2",
        "_scaled_mm_v2",
        "_sparse_addmm",
        "_sparse_mm",
        "_sparse_mm_reduce_impl",
        "_sparse_semi_structured_addmm",
        "_sparse_semi_structured_linear",
        "_sparse_semi_structured_mm",
        "_sparse_sparse_matmul",
        "_transformer_encoder_layer_fwd",
        "_triton_multi_head_attention",
        "_triton_scaled_dot_attention",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
        "_weight_int4pack_mm_with_scales_and_zeros",
        "_weight_int8pack_mm",
        "_wrapped_quantized_linear_prepacked",
        "conv_depthwise3d",
        "conv_tbc",
        "cudnn_convolution_add_relu",
        "cudnn_convolution_relu",
        "cudnn_convolution_transpose",
        "fbgemm_linear_fp16_weight",
        "fbgemm_linear_fp16_weight_fp32_activation",
        "fbgemm_linear_int8_weight",
        "fbgemm_linear_int8_weight_fp32_activation",
        "hspmm",
        "miopen_convolution",
        "miopen_convolution_add_relu",
        "miopen_convolution_relu",
        "miopen_convolution_transpose",
        "miopen_depthwise_convolution",
        "mkldnn_convolution",
        "mkldnn_linear",
        "quantized_gru",
        "quantized_lstm",
        "slow_conv3d_forward",
        "slow_conv_dilated2d",
        "slow_conv_dilated3d",
        "slow_conv_transpose2d",
        "slow_conv_transpose3d",
        "smm",
        "sparse_sampled_addmm",
        "sspaddmm",
    }
)

# Namespaces of operators that are torch's own and multiply nothing, or are taken apart into what is counted.
KNOWN = frozenset({"aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "debugprims"})
# torchvision's operators sample, pool and choose boxes; one of them convolves.
TORCHVISION, DEFORMED = "torchvision", "torchvision::deform_conv2d"


def missed(operator: Any, counted: Mapping[Any, Any]) -> str | None:
    """Name of an operator that multiplies matrices, or may, and has no formula; None for any other.

    Args:
        operator: An overload of an operator, as a dispatch mode sees it; or a higher-order operator.
        counted: Formulas by overload packet.
    """
    if not isinstance(operator, torch._ops.OpOverload) or operator._overloadpacket in counted:
        return None
    namespace, _, name = operator._schema.name.partition("::")
    if namespace == "aten":
        return f"aten::{name}" if name in PRODUCTS else None
    if namespace == TORCHVISION:
        return DEFORMED if f"{namespace}::{name}" == DEFORMED else None
    return None if namespace in KNOWN else f"{namespace}::{name}"


def _recurrent(inputs: Shape, weights: Sequence[Shape]) -> int:
    """FLOPs of a fused recurrent kernel: every matrix (input, hidden, projection; each layer and direction) meets every
    step of every sample once. A packed sequence comes as its steps, shape (steps of all samples, features).
    """
    steps = prod(inputs[:-1])
    return 2 * steps * sum(prod(weight) for weight in weights if len(weight) == 2)


def _fused_rnn(inputs: Shape, weights: Sequence[Shape], *rest: Any, **options: Any) -> int:
    """FLOPs of `_cudnn_rnn` and `miopen_rnn`, which get the matrices and biases of all layers in one list."""
    return _recurrent(inputs, weights)


def _onednn_rnn(inputs: Shape, input_weight: Shape, hidden_weight: Shape, *rest: Any, **options: Any) -> int:
    """FLOPs of `mkldnn_rnn_layer`: one layer, one direction."""
    return _recurrent(inputs, [input_weight, hidden_weight])


def _trilinear(
    first: Shape,
    second: Shape,
    third: Shape,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    *rest: Any,
    **options: Any,
) -> int:
    """FLOPs of `_trilinear`, the kernel of `nn.Bilinear`: one multiply-accumulate an element of the whole product.

    `y_bo = Σ_ij x_bi W_oij z_bj` has B·O·I·J of them. The products with `z_bj` after the sum over i are a small part of
    that (one I-th) and are left out.
    """
    shapes = []
    for own, expand in ((first, expand1), (second, expand2), (third, expand3)):
        shape = list(own)
        for axis in sorted(expand):
            shape.insert(axis, 1)
        shapes.append(shape)
    return 2 * prod(int(max(sizes)) for sizes in zip(*shapes, strict=True))


def _matrix_vector(matrix: Shape, vector: Shape, *rest: Any, **options: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(bias: Shape, matrix: Shape, vector: Shape, *rest: Any, **options: Any) -> int:
    return 2 * prod(matrix)


def _dot(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    return 2 * prod(first)


def _matrices(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    return 2 * prod(first) * second[-1]


def _grouped(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    """FLOPs of `_grouped_mm`: groups are slices of rows, of the inner axis, or of the columns of a two-axis `second`,
    and each row (of its group, where `first` has three axes) meets each column once.
    """
    rows = first[1:] if len(first) == 3 and len(second) == 2 else first
    return 2 * prod(rows) * second[-1]


def _added_matrices(bias: Shape, first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    return 2 * prod(first) * second[-1]


_OWN: Mapping[str, Callable[..., int]] = {
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "addmv_": _added_matrix_vector,
    "dot": _dot,
    "vdot": _dot,
    "_int_mm": _matrices,
    "_grouped_mm": _grouped,
    "addmm_": _added_matrices,
    "addbmm": _added_matrices,
    "addbmm_": _added_matrices,
    "baddbmm_": _added_matrices,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _onednn_rnn,
    "_cudnn_rnn": _fused_rnn,
    "miopen_rnn": _fused_rnn,
}
# Formulas by overload packet: FLOPs from the shapes of the arguments, as torch's counter takes them.
FORMULAS: Mapping[Any, Callable[..., int]] = {getattr(torch.ops.aten, name): formula for name, formula in _OWN.items()}

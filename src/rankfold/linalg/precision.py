"""The dtype of numerical work, and conversions of tensors to it and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGE = 256  # number of features from which a Gram is computed in blocks
FULL = ("ieee", "none")  # settings of torch under which products in float32 carry all its bits
_ONE_AT_A_TIME = threading.RLock()  # the setting is the process's, so two threads must not restore it for each other
NEAR_ONE = 2.0**20  # products of numbers below it, and sums of many of them, are far from the range of float32


def work_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it (CPU, CUDA), float32 where it has not (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(tensor: Tensor) -> Tensor:
    """A detached copy-free view of `tensor` in the work dtype (a copy where the dtype differs)."""
    return tensor.detach().to(work_dtype(tensor.device))


def power_of_two_scale(tensor: Tensor) -> Tensor:
    """The power of two nearest below the largest magnitude, as a scalar tensor; 1 for a zero tensor.

    Dividing by it and multiplying back changes no bit of the mantissa, so products of tensors scaled by 1e±20 neither
    overflow nor vanish.
    """
    largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    exponent = torch.frexp(largest.to(work_dtype(tensor.device)))[1] - 1  # frexp's mantissa is in [1/2, 1)
    usable = torch.isfinite(largest) & (largest > 0)
    return torch.where(usable, torch.exp2(exponent.to(work_dtype(tensor.device))), 1.0)


@contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Context in which products of float32 tensors carry all 24 bits, whatever the user allows for other products.

    TF32 and bfloat16 products (`torch.set_float32_matmul_precision`, `torch.backends.….fp32_precision`, autocast) carry
    eleven and eight: enough for a forward pass, but a covariance would lose every direction below a thousandth of the
    largest. The user's settings are restored afterwards. They belong to the process: products of other threads are
    exact meanwhile too.

    Args:
        device: Device of the tensors; on devices other than CPU and CUDA only autocast is turned off.
    """
    with torch.autocast(device.type, enabled=False), _ONE_AT_A_TIME:
        backends: Any = torch.backends  # whose members torch does not annotate
        both = {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
        matmul = both.get(device.type)
        if matmul is None or matmul.fp32_precision in FULL:
            yield
            return
        allowed = {each: each.fp32_precision for each in both.values()}
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # torch raises where the newer settings were used, and then reads those alone
            legacy = None
        if legacy is None:
            matmul.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")  # which sets both, so that torch may go on reading either
        try:
            yield
        finally:
            if legacy is not None:
                torch.set_float32_matmul_precision(legacy)
            for each, precision in allowed.items():
                each.fp32_precision = "none"  # if that gives the same, it was inherited
                if each.fp32_precision != precision:
                    each.fp32_precision = precision


def gram(rows: Tensor) -> Tensor:
    """Sum of outer products of rows, `XᵀX`, in the work dtype, from products in the rows' own dtype with all its bits.

    Args:
        rows: Rows `X`, shape (…, positions, features); half precision is widened to float32 first.

    Returns:
        Shape (…, features, features) in the work dtype. Rows scaled by 1e±20 are handled by a power-of-two scaling.
    """
    wide, scale = _scaled(rows, torch.promote_types(rows.dtype, torch.float32))
    half = wide.shape[-1] // 2
    with full_products(wide.device):
        if half < LARGE // 2:
            return _unscaled(wide.mT @ wide, scale, scale)
        # The block below the diagonal is the one above it, transposed: a quarter of the products less.
        product = wide.new_empty(*wide.shape[:-2], wide.shape[-1], wide.shape[-1])
        upper = wide[..., :half].mT @ wide
        product[..., :half, :] = upper
        product[..., half:, :half] = upper[..., half:].mT
        product[..., half:, half:] = wide[..., half:].mT @ wide[..., half:]
    return _unscaled(product, scale, scale)


def total(rows: Tensor) -> Tensor:
    """Sum of rows, shape (…, positions, features) → (…, features), in the work dtype, summed in the rows' own."""
    wide, scale = _scaled(rows, torch.promote_types(rows.dtype, torch.float32))
    return _unscaled(wide.sum(-2), scale)


def cross(left: Tensor, right: Tensor) -> Tensor:
    """Sum of outer products of paired rows, `LᵀR`, in the work dtype; see `gram`.

    Args:
        left: Rows `L`, shape (…, positions, m).
        right: Rows `R`, shape (…, positions, n); where the two dtypes differ, products are taken in the wider one.

    Returns:
        Shape (…, m, n).
    """
    shared = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    a, scale_left = _scaled(left, shared)
    b, scale_right = _scaled(right, shared)
    with full_products(a.device):
        return _unscaled(a.mT @ b, scale_left, scale_right)


def _scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A tensor divided by its power of two, and that power; None where it is so near 1 that products need none."""
    wide = tensor.to(dtype)
    if wide.numel() == 0:
        return wide, None
    largest = torch.stack(torch.aminmax(wide)).abs().amax()
    if bool((largest >= 1 / NEAR_ONE) & (largest <= NEAR_ONE)):
        return wide, None
    scale = power_of_two_scale(largest)
    return wide / scale.to(dtype), scale


def _unscaled(product: Tensor, *scales: Tensor | None) -> Tensor:
    """A product in the work dtype, multiplied by the scales of its factors."""
    wide = product.to(work_dtype(product.device))
    for scale in scales:
        if scale is not None:
            wide = wide * scale
    return wide

"""Which dtype numerical work is done in, and how tensors get there and back."""

from __future__ import annotations

import torch
from torch import Tensor


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


def gram(rows: Tensor) -> Tensor:
    """Sum of outer products of rows, `XᵀX`, accumulated in the work dtype from products in the rows' own dtype.

    Args:
        rows: `X`, shape (…, positions, features); half precision is widened to float32 first.

    Returns:
        Shape (…, features, features) in the work dtype. Rows scaled by 1e±20 are handled by a power-of-two scaling.
    """
    return cross(rows, rows)


def cross(left: Tensor, right: Tensor) -> Tensor:
    """Sum of outer products of paired rows, `LᵀR`, in the work dtype; see `gram`.

    Args:
        left: `L`, shape (…, positions, m).
        right: `R`, shape (…, positions, n); where the two dtypes differ, products are taken in the wider one.

    Returns:
        Shape (…, m, n).
    """
    shared = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    a, scale_left = _scaled(left, shared)
    b, scale_right = (a, scale_left) if right is left else _scaled(right, shared)
    return (a.mT @ b).to(scale_left.dtype) * scale_left * scale_right


def _scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor divided by its power of two, and that power."""
    wide = tensor.to(dtype)
    scale = power_of_two_scale(wide)
    return wide / scale.to(dtype), scale

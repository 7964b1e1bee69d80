"""Test whether two outputs that should be the same are so, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-4  # relative difference that rounding explains in a whole output, float32
LOCAL = 1e-2  # error that is allowed in one entry, relative to how far it moves
STEPS = 64  # `eps` of the dtype that rounding explains in a whole output, where these are more
LOOKED_AT = 1 << 20  # entries of which a quartile is taken
LARGE = 1 << 23  # entries that are compared at once


@dataclass(frozen=True)
class Misfit:
    """How far an output is from what it should be.

    Attributes:
        difference: Relative difference `‖g − e‖ / ‖e‖` over all entries.
        allowed: Largest relative difference that rounding explains.
        local: Error of the worst entry, over what rounding explains there (`local_misfit`).
    """

    difference: float = 0.0
    allowed: float = TOLERANCE
    local: float = 0.0

    @property
    def worst(self) -> float:
        """The larger of both, over what is allowed: the outputs are the same only up to 1 (NaN is not)."""
        return max(self.difference / self.allowed, self.local)


def misfit(got: Tensor, expected: Tensor, before: Tensor) -> Misfit:
    """Compare an output with what it should be, as a whole and entry by entry, in float64.

    Args:
        got: Output `g`, shape (samples, …).
        expected: Expected output `e`, of the same shape.
        before: Output of the unchanged model, of the same shape.
    """
    return Misfit(relative_difference(got, expected), tolerance(expected.dtype), local_misfit(got, expected, before))


def _columns(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as samples × entries in float64, in parts of some entries where they are large."""
    flat = [value.flatten(1) if value.ndim > 1 else value.reshape(-1, 1) for value in values]
    width = max(1, LARGE // max(flat[0].shape[0], 1))
    for part in zip(*(torch.split(value, width, 1) for value in flat), strict=True):
        yield tuple(value.double() for value in part)


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference of a whole output that rounding explains."""
    return max(TOLERANCE, STEPS * torch.finfo(dtype).eps)


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """`‖g − e‖ / ‖e‖` over all entries, in float64."""
    lost = whole = 0.0
    for mine, wide in _columns(got, expected):
        lost += float((mine - wide).square().sum())
        whole += float(wide.square().sum())
    return math.sqrt(lost) / max(math.sqrt(whole), 1e-30)


def local_misfit(got: Tensor, expected: Tensor, before: Tensor) -> float:
    """The largest error of one entry, over what rounding explains there: above 1 the outputs are not the same.

    `max |g − e|_ij / (0.01 m_j + t (q + |e_ij|))`, where `m_j` is the root mean square over samples of `e − before`
    at entry j, `t` the `tolerance` and `q` the lower quartile of `|e|`. Entries that neither differ nor move
    carry no information and are left out of all of it. So a fault shows beside entries a billion times larger, such as
    masked logits or boxes in pixels, to which `relative_difference` is blind.

    Args:
        got: Output `g`, shape (samples, …).
        expected: Expected output `e`, of the same shape.
        before: Output of the unchanged model, of the same shape.
    """
    every = max(1, expected.numel() // LOOKED_AT)
    seen = [wide.abs()[_moving(mine, wide, old)][::every] for mine, wide, old in _columns(got, expected, before)]
    sizes = torch.cat(seen) if seen else torch.zeros(0)
    if not len(sizes):
        return 0.0
    quartile = sizes.kthvalue(max(1, len(sizes) // 4)).values
    worst = quartile.new_zeros(())
    for mine, wide, old in _columns(got, expected, before):
        moving = _moving(mine, wide, old)
        if bool(moving.any()):
            scale = (wide - old).square().mean(0, keepdim=True).sqrt()
            allowed = LOCAL * scale + tolerance(expected.dtype) * (quartile + wide.abs())
            worst = torch.maximum(worst, ((mine - wide).abs() / allowed.clamp_min(1e-30))[moving].max())  # NaN stays
    return float(worst)


def _moving(got: Tensor, expected: Tensor, before: Tensor) -> Tensor:
    """Which entries differ, or are not what they were."""
    return (got != expected) | (expected != before)

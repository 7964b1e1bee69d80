"""Whether two outputs that should be the same are, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of a whole output, relative, float32
LOCAL = 1e-2  # of one entry, relative to how far it moves
STEPS = 64  # of the dtype, in half precision
LOOKED_AT = 1 << 20  # entries of which a quartile is taken


@dataclass(frozen=True)
class Misfit:
    """How far an output is from what it should be.

    Attributes:
        difference: `‖g − e‖ / ‖e‖` over all entries.
        allowed: What rounding explains of that.
        local: The error of the worst entry, over what rounding explains there (`local_misfit`).
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
        got: `g`, shape (samples, …).
        expected: `e`, of the same shape.
        before: The same output of the unchanged model.
    """
    return Misfit(relative_difference(got, expected), tolerance(expected.dtype), local_misfit(got, expected, before))


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference of a whole output that rounding explains."""
    return max(TOLERANCE, STEPS * torch.finfo(dtype).eps)


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """`‖g − e‖ / ‖e‖` over all entries, in float64."""
    wide = expected.double()
    return float((got.double() - wide).norm() / wide.norm().clamp_min(1e-30))


def local_misfit(got: Tensor, expected: Tensor, before: Tensor) -> float:
    """The largest error of one entry, over what rounding explains there: above 1 the outputs are not the same.

    `max |g − e|_ij / (0.01 m_j + t (q + |e_ij|))`, where `m_j` is the root mean square over samples of `e − before`
    at entry j, `t` the `tolerance` and `q` the lower quartile of `|e|`. Entries that neither differ nor move say
    nothing and are left out of all of it. So a fault shows beside entries a billion times larger, such as masked
    logits or boxes in pixels, to which `relative_difference` is blind.

    Args:
        got: `g`, shape (samples, …).
        expected: `e`.
        before: The same output of the unchanged model.
    """
    wide = expected.double()
    error, move = (got.double() - wide).abs(), (wide - before.double()).abs()
    moving = (error != 0) | (move != 0)
    if not bool(moving.any()):
        return 0.0
    sizes = wide.abs()[moving]
    sizes = sizes[:: max(1, len(sizes) // LOOKED_AT)]
    quartile = sizes.kthvalue(max(1, len(sizes) // 4)).values
    rounding = tolerance(expected.dtype) * (quartile + wide.abs())
    allowed = LOCAL * move.square().mean(0, keepdim=True).sqrt() + rounding
    return float((error / allowed.clamp_min(1e-30))[moving].max())

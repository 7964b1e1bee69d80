"""Targets behind a rectifier: what it cuts off may be anything that it cuts off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.graph.lockstep import Arrival
from rankfold.graph.regions import channel_affine

SMALL_SCALE = 0.05  # of the median: channels scaled by less cannot take up the skip branch's error


@dataclass(frozen=True, eq=False)
class Behind:
    """What lies between a layer's output `y` and the next layer: `clip(a·y + c + skip)`, each part where there is one.

    Attributes:
        inverse: `1/a`, 0 where `a` is too small to invert; broadcasts against the output.
        low: `(lower bound − c)/a` for positive `a`, the upper bound's for negative; None without a rectifier.
        high: The other one.
        skip: Whether the target takes up the error of the skip branch.
    """

    inverse: Tensor
    low: Tensor | None
    high: Tensor | None
    skip: bool

    @classmethod
    def of(cls, arrival: Arrival, *, absorb_skip: bool, rectify: bool) -> Behind | None:
        """What lies behind a layer; None where its target is its plain output.

        Args:
            arrival: Where the walk stands.
            absorb_skip: Whether targets take up the error of a skip branch.
            rectify: Whether to look for a rectifier.
        """
        call, output = arrival.call, arrival.outputs[0]
        skip = absorb_skip and arrival.skip is not None and not arrival.skip.same
        known = call.skip is None or (arrival.skip is not None and (absorb_skip or arrival.skip.same))
        bounds = call.bounds if rectify and known else None
        if not skip and bounds is None:
            return None
        factor, shift = channel_affine(call, output.shape, arrival.tensor)
        factor = torch.ones((), dtype=torch.float64, device=output.device) if factor is None else factor
        shift = torch.zeros_like(factor) if shift is None else shift
        size = factor.abs()
        usable = size > SMALL_SCALE * size.median()
        inverse = torch.where(usable, 1 / factor, 0.0)
        low = high = None
        if bounds is not None:
            infinite = torch.full_like(inverse, float("inf"))
            ends = [torch.where(usable, (bound - shift) * inverse, infinite) for bound in bounds]
            low = torch.where(usable, torch.minimum(*ends), -infinite).to(output.dtype)
            high = torch.where(usable, torch.maximum(*ends), infinite).to(output.dtype)
        return cls(inverse.to(output.dtype), low, high, skip)

    def target(self, arrival: Arrival, part: int) -> Tensor:
        """`y + (skip − skip')/a` of a micro-batch."""
        wanted: Tensor = arrival.outputs[part]
        if not self.skip or arrival.skip is None:
            return wanted
        error: Tensor = arrival.skip.original[part] - arrival.skip.compressed[part]
        return wanted + error * self.inverse

    def ends(self, arrival: Arrival, part: int) -> tuple[Tensor, Tensor] | None:
        """Below and above which values of `y` the rectifier cuts off, in a micro-batch; None without a rectifier."""
        if self.low is None or self.high is None:
            return None
        shape = arrival.outputs[part].shape
        if arrival.skip is None:
            return self.low.expand(shape), self.high.expand(shape)
        moved = arrival.skip.compressed[part] * self.inverse
        return self.low - moved, self.high - moved


def relaxed(wanted: Tensor, predicted: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The target nearest to what is predicted among all that come out of the rectifier as the wanted value does.

    Where the original is cut off at a bound, any value beyond it is as good.
    """
    below, above = torch.minimum(predicted, low), torch.maximum(predicted, high)
    return torch.where(wanted <= low, below, torch.where(wanted >= high, above, wanted))

"""Removal curves + budget → how many units of each group stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rankfold.allocation import Selector
from rankfold.channels.stacks import Widths
from rankfold.checks import check_number
from rankfold.errors import OptionError
from rankfold.registry import register

STEPS = 64  # a group's units go in about so many steps
TINY = torch.finfo(torch.float64).tiny


class WidthSelector(Selector, ABC):
    """Choice of how many units of each channel group stay. A subclass is a frozen, registered dataclass.

    What it `reads` are optional fields of `RemovalCurve`: "relative", "remainders".
    """

    chooses: ClassVar[str] = "widths"

    def select(self, widths: Widths) -> dict[str, int]:
        """Choose how many units of each group stay, so that every bound holds.

        Args:
            widths: Widths of all groups, still whole; changed in place.

        Returns:
            Units that stay by name of the group.

        Raises:
            BudgetError: The bounds are not met with the least of every group.
        """
        self.shrink(widths)
        return widths.chosen()

    @abstractmethod
    def shrink(self, widths: Widths) -> None:
        """Take units away until every bound holds.

        Args:
            widths: Widths of all groups, still whole; changed in place.

        Raises:
            BudgetError: The bounds are not met with the least of every group.
        """


@register("removal-greedy")
@dataclass(frozen=True)
class RemovalGreedy(WidthSelector):
    """Takes the cheapest step first, until every bound holds.

    A step removes the next few units of one group; its price is the error it adds over the cost it saves, as shares of
    the bounds that do not hold yet. What a step saves depends on what is left of the layers on both sides, so prices
    are set anew after each.

    Attributes:
        relative: Weight, in [0, 1], of errors relative to each reader's own output, beside errors weighted by the
            gradients of the model's output; both are scaled so that losing every group costs 1.
        evenness: Degree, in [0, 1], to which sizes are drawn towards those of `SameShare`. Prices of single groups do
            not add up where many are cut: on ResNet-56 at half and 0.3 of the parameters, and on MiniLM-L6 at 0.7,
            half-way was better than either end; on MiniLM-L6 at half, the cheapest steps were.
    """

    relative: float = 0.0
    evenness: float = 0.0

    def __post_init__(self) -> None:
        for name in ("relative", "evenness"):
            law = "a number in [0, 1]"
            check_number(f"RemovalGreedy.{name}", getattr(self, name), law=law, cure="try 0.5, or 0", high=1)

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Selector.reads`."""
        return ("relative",) if self.relative > 0 else ()

    def shrink(self, widths: Widths) -> None:
        """See `WidthSelector.shrink`."""
        errors = _errors(widths, self.relative)
        even = list(widths.left)
        if self.evenness > 0:
            SameShare().shrink(widths)
            even = list(widths.left)
            for s in _all(widths):
                widths.set(s, widths.units(s))
        steps = [max(1, widths.units(s) // STEPS) for s in _all(widths)]
        while broken := widths.broken():
            best, chosen = float("inf"), None
            for s, step in enumerate(steps):
                left, units = widths.left[s], widths.units(s)
                after = widths.rounded(s, left - step)
                if after >= left:
                    continue
                saved = widths.saved(s, after).amounts()
                worth = sum(saved[name] / max(widths.bounds[name], 1) for name in broken)
                price = float(errors[s][units - after] - errors[s][units - left]) / max(worth, 1e-30)
                if worth > 0 and price < best:
                    best, chosen = price, (s, after)
            if chosen is None:
                raise widths.impossible()
            widths.set(*chosen)

        def last(s: int) -> float:
            gone = widths.units(s) - widths.left[s]
            return float(errors[s][gone] - errors[s][max(0, gone - steps[s])])

        if self.evenness > 0:
            _shrink(
                widths, [self.evenness * a + (1 - self.evenness) * b for a, b in zip(even, widths.left, strict=True)]
            )
        widths.give_back(sorted(_all(widths), key=last, reverse=True))


@register("same-share")
@dataclass(frozen=True)
class SameShare(WidthSelector):
    """Keeps the same share of every group, as large as the bounds allow.

    A stream that several layers write stays whole, unless the bounds cannot be met without it.
    """

    def shrink(self, widths: Widths) -> None:
        """See `WidthSelector.shrink`."""
        for spared in (True, False):
            for percent in range(100, -1, -1):
                for s in _all(widths):
                    units = widths.units(s)
                    stream = any(len(curve.group.made) > 1 for curve in widths.groups(s))
                    wanted = units if spared and stream else max(1, units * percent // 100)
                    widths.set(s, widths.rounded(s, wanted))
                if not widths.broken():
                    widths.give_back(_all(widths))
                    return
        raise widths.impossible()


@register("interpolative-greedy")
@dataclass(frozen=True)
class InterpolativeGreedy(WidthSelector):
    """The iterative rule of Chee et al.: the group whose next cut loses least per operation is cut, again and again.

    With `C_i` units left of group i and `k_i = ⌊κ C_i⌋`, the group of least
    `(|R_i[k_i, k_i]| / |R_i[0, 0]|) / (FLOPs_i + FLOPs_{i+1})` goes down to `k_i`, until every bound holds. `R_i` is
    the triangle of the pivoted QR of the group's activations, the FLOPs are those of the layers on both sides as they
    are by then.

    Attributes:
        kappa: Factor `κ`, in (0, 1); the authors use 0.90, 0.95 and 0.98.

    References:
        Chee, Flynn, Damle, De Sa, NeurIPS 2022, arXiv 2108.00065. We differ in reading `R` once, from the original's
        Gram: the first pivots of kept columns are what they were, but what later layers see changes as layers before
        them are cut. Groups on residual streams have several readers: their Grams are added up.
    """

    kappa: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.kappa, float) or not 0 < self.kappa < 1:
            raise OptionError(
                "InterpolativeGreedy.kappa", law="a number in (0, 1)", got=repr(self.kappa), cure="try 0.95"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Selector.reads`."""
        return ("remainders",)

    def shrink(self, widths: Widths) -> None:
        """See `WidthSelector.shrink`."""
        remainders = [[_known(curve.remainders) for curve in widths.groups(s)] for s in _all(widths)]
        while widths.broken():
            best, chosen = float("inf"), None
            for s in _all(widths):
                left = widths.left[s]
                after = widths.rounded(s, int(self.kappa * left))
                if after >= left:
                    continue
                lost = sum(float(own[after] / own[0].clamp_min(TINY)) for own in remainders[s])
                score = lost / max(widths.work(s), 1)
                if score < best:
                    best, chosen = score, (s, after)
            if chosen is None:
                raise widths.impossible()
            widths.set(*chosen)


def _shrink(widths: Widths, wanted: Sequence[float]) -> None:
    """Go to the largest multiple of some sizes that the bounds allow."""
    for percent in range(110, -1, -1):
        for s in _all(widths):
            widths.set(s, widths.rounded(s, max(1, int(wanted[s] * percent / 100))))
        if not widths.broken():
            return
    raise widths.impossible()


def _all(widths: Widths) -> range:
    return range(len(widths.stacks))


def _known(value: torch.Tensor | None) -> torch.Tensor:
    """An optional field of a curve that a selector reads; a programmer's error where `reads` did not ask for it."""
    if value is None:
        raise TypeError("the curves lack what the selector reads")
    return value


def _errors(widths: Widths, relative: float) -> list[torch.Tensor]:
    """Errors of every stack by units removed."""
    weighted = [torch.stack([curve.errors for curve in widths.groups(s)]).sum(0) for s in _all(widths)]
    if not relative:
        return weighted
    own = [torch.stack([_known(curve.relative) for curve in widths.groups(s)]).sum(0) for s in _all(widths)]
    first, second = (
        share / (sum(float(errors[-1]) for errors in each) or 1.0)
        for share, each in ((1 - relative, weighted), (relative, own))
    )
    return [first * one + second * other for one, other in zip(weighted, own, strict=True)]


HALF_WAY = "half-way"
SIZES: dict[str, WidthSelector] = {
    "cheapest": RemovalGreedy(),
    HALF_WAY: RemovalGreedy(evenness=0.5),
    "three quarters": RemovalGreedy(evenness=0.75),
    "same share": SameShare(),
}

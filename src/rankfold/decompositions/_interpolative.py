"""Removal of channels that the others predict linearly; the prediction is folded into the layers that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankfold.checks import check_count, check_flag
from rankfold.decompositions._base import Family
from rankfold.errors import OptionError, near_matches
from rankfold.registry import register

RULES = ("backward", "magnitude", "pivoted-qr", "random", "strong-rrqr")


@register("interpolative")
@dataclass(frozen=True)
class Interpolative(Family):
    """Remove channels (neurons) in groups, and fold a correction into the layers that read them.

    The network keeps its structure: no layer is added, tensors become smaller. Of a group of channels `Z` some columns
    `J` stay; every layer that reads them gets the least-squares weight on `Z_J`, from its own inputs.

    Attributes:
        rule: Rule that chooses the channels that stay. "backward": elimination with refit, the cheapest channels first,
            exact for what their removal costs the layers that read them. "pivoted-qr": the first pivots of the
            activations. "strong-rrqr": those, with exchanges until no coefficient is above 2. "magnitude": the largest
            rows of the layers that make them. "random": a random choice.
        fold: True if the layers that read the channels are corrected; False only cuts channels.
        multiple_of: Number to whose multiples the kept units are rounded, where a group has so many.
        uniform: True if groups at the same place of like layers keep equally many units: every block of a stack has the
            same width, as configurations of stock architectures require.

    References:
        Chee, Flynn, Damle, De Sa, NeurIPS 2022, arXiv 2108.00065 (pivoted QR, `W ← W Tᵀ`). We differ in choosing by
        what the readers lose, in one fold for each reader on its own inputs, in a bias that takes up the means, and in
        groups through residual streams, concatenation and depthwise convolutions.
    """

    needs: ClassVar[tuple[str, ...]] = ("input-gram", "input-mean")
    sized_by: ClassVar[str] = "widths"
    cuts_fixed: ClassVar[bool] = True
    rule: str = "backward"
    fold: bool = True
    multiple_of: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise OptionError(
                "Interpolative.rule",
                law=f"one of {', '.join(RULES)}",
                got=repr(self.rule),
                cure=near_matches(str(self.rule), RULES),
            )
        for name in ("fold", "uniform"):
            check_flag(f"Interpolative.{name}", getattr(self, name))
        check_count("Interpolative.multiple_of", self.multiple_of, cure="try 8")

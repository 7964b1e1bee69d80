"""Ranks that are multiples of a number, which suits the hardware."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankfold.allocation._base import RankSelector
from rankfold.allocation._lagrangian import Lagrangian
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_count
from rankfold.errors import OptionError
from rankfold.registry import register


@register("rounded")
@dataclass(frozen=True)
class Rounded(RankSelector):
    """Another selector's choice among ranks that are multiples of a number. The budget stays an upper bound.

    A site where no multiple is smaller than dense stays dense.

    Attributes:
        selector: The selector that chooses.
        multiple: Divisor of every rank (of every part of a tuple); at least 1.
    """

    selector: RankSelector = field(default_factory=Lagrangian)
    multiple: int = 8

    def __post_init__(self) -> None:
        check_count("Rounded.multiple", self.multiple, cure="try 8")
        if not isinstance(self.selector, RankSelector):
            raise OptionError(
                "Rounded.selector", law="an instance of a selector", got=repr(self.selector), cure="try Lagrangian()"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the data that the inner selector reads."""
        return self.selector.reads

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""

        def fits(option: Option) -> bool:
            parts = option.rank if isinstance(option.rank, tuple) else (option.rank,)
            return all(part is not None and part % self.multiple == 0 for part in parts)

        return self.selector.select(problem.restricted(fits))

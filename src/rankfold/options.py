"""Options of a compression, whatever the budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankfold.allocation import Budget, RankSelector, Selector
from rankfold.allocation.measuring import needed
from rankfold.decompositions import Family
from rankfold.errors import OptionError
from rankfold.outputs.taken import Outputs
from rankfold.plan.repair import Lockstep
from rankfold.statistics import GradientGram


@dataclass(frozen=True)
class Options:
    """Options of a compression, but for its budget; see `compress`.

    Attributes:
        families: Methods to choose from.
        repair: The repair, or None.
        selector: The selector that was given, or None.
        weighting: True if gradients are collected.
        outputs: Kinds of the outputs, as they were given.
        positions: Maximum number of positions of each sample, or None.
        seed: Seed of everything that is drawn.
        work_dir: A directory that keeps finished work, or None.
        limit: Maximum number of bytes of values and moments, or None.
    """

    families: tuple[Family, ...]
    repair: Lockstep | None
    selector: Selector | None = None
    weighting: bool = True
    outputs: Outputs = None
    positions: int | None = None
    seed: int = 0
    work_dir: str | Path | None = None
    limit: int | None = None

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that are collected for the families."""
        return needed(self.families)

    @property
    def collected(self) -> list[str]:
        """Names of all statistics that are collected."""
        return [*self.statistics, GradientGram.name] if self.weighting else self.statistics


def settled_budget(budget: object, selector: object) -> Budget:
    """The budget that was given; without one, that of the original's size where a selector does not look at it.

    Raises:
        OptionError: It is no budget, or there is none where one is needed.
    """
    if budget is None and isinstance(selector, RankSelector) and selector.local:
        return Budget(params=1.0)
    if not isinstance(budget, Budget):
        raise OptionError("budget", law="a rankfold.Budget", got=repr(budget), cure="try rankfold.Budget(params=0.5)")
    return budget

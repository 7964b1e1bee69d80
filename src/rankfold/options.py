"""What a compression is asked for, whatever the budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankfold.allocation import Selector
from rankfold.allocation.measuring import needed
from rankfold.decompositions import Family
from rankfold.outputs.taken import Outputs
from rankfold.plan.repair import Lockstep
from rankfold.statistics import GradientGram


@dataclass(frozen=True)
class Options:
    """What a compression is asked for, but for its budget; see `compress`.

    Attributes:
        families: Methods to choose from.
        repair: The repair, or None.
        selector: The one that was named, or None.
        weighting: Whether gradients are collected.
        outputs: What the outputs are, as it was said.
        positions: Most positions a sample, or None.
        seed: Of everything that is drawn.
        work_dir: A directory that keeps what is finished, or None.
        limit: Most bytes of values and moments, or None.
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
        """Names of what is collected for the families."""
        return needed(self.families)

    @property
    def collected(self) -> list[str]:
        """Names of all that is collected."""
        return [*self.statistics, GradientGram.name] if self.weighting else self.statistics

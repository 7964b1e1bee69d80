"""The same error at every site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankfold.allocation._base import RankSelector, Table, largest_fitting, pick, top_up
from rankfold.allocation._lagrangian import cheapest
from rankfold.allocation.curve import Option, Problem
from rankfold.registry import register


@register("energy")
@dataclass(frozen=True)
class Energy(RankSelector):
    """No site makes an error above ε: each gets the cheapest option with error ≤ ε, ε as small as the budget allows.

    The threshold rule of most SVD pruners, with the threshold found from the budget instead of guessed. For errors
    relative to each site's output it means that every site keeps the same share of its output energy.
    """

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        smallest = cheapest(problem, table)
        worst = max((float(errors.max()) for errors in table.errors), default=0.0)

        def choose(t: float) -> list[int]:
            if t <= 0:
                return smallest
            bound = worst * (1 - t) ** 4  # most of the interesting thresholds lie near 0
            return table.choose(lambda i: np.where(table.errors[i] <= bound, table.loads[i].max(1), np.inf))

        found = largest_fitting(problem, choose)
        return pick(problem, top_up(table, smallest if found is None else found))

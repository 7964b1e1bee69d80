"""The same kept fraction at every site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankfold.ranks._base import RankSelector, Table, largest_fitting, pick, top_up
from rankfold.ranks._lagrangian import cheapest
from rankfold.ranks.curve import Option, Problem
from rankfold.registry import register


@register("uniform")
@dataclass(frozen=True)
class Uniform(RankSelector):
    """Every site keeps the same fraction ρ of its cost, ρ as large as the budget lets it be.

    At a site the option of least error is taken, of any family, whose cost in every bounded resource is at most ρ times
    the dense one. What whole ranks leave over is spent step by step where it removes most error.
    """

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        shares = [(loads / np.maximum(loads[0], 1e-300)).max(1) for loads in table.loads]
        smallest = cheapest(problem, table)

        def choose(fraction: float) -> list[int]:
            chosen = []
            for i, share in enumerate(shares):
                fits = np.flatnonzero(share <= fraction + 1e-12)
                chosen.append(int(fits[np.argmin(table.errors[i][fits])]) if len(fits) else smallest[i])
            return chosen

        found = largest_fitting(problem, choose)
        return pick(problem, top_up(table, smallest if found is None else found))

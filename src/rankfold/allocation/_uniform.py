"""The same kept fraction at every site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rankfold.allocation._base import RankSelector, Table, largest_fitting, pick, top_up
from rankfold.allocation._lagrangian import cheapest
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_number
from rankfold.registry import register


@register("uniform")
@dataclass(frozen=True)
class Uniform(RankSelector):
    """Every site keeps the same fraction ρ of its cost, ρ as large as the budget allows.

    The smallest sites, which together hold at most the share `spared` of the cost, stay dense: cutting a depthwise
    convolution saves next to nothing and costs as much accuracy as any. At the others the option of least error is
    taken, of any family, whose cost in every bounded resource is at most ρ times the dense one. Where that cannot meet
    the budget, no site is spared. The rest that whole ranks leave is spent step by step where it removes most error.

    Attributes:
        spared: Share of the sites' cost, in [0, 1), that the smallest of them may hold together and stay dense.
    """

    spared: float = 0.02

    def __post_init__(self) -> None:
        law, cure = "a number in [0, 1)", "leave it out, or pass 0"
        check_number("Uniform.spared", self.spared, law=law, cure=cure, high=math.nextafter(1, 0))

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        shares = [(loads / np.maximum(loads[0], 1e-300)).max(1) for loads in table.loads]
        smallest = cheapest(problem, table)
        small = _small(table, self.spared)

        def choose(fraction: float, spared: frozenset[int] = small) -> list[int]:
            chosen = []
            for i, share in enumerate(shares):
                if i in spared:
                    chosen.append(0)
                    continue
                fits = np.flatnonzero(share <= fraction + 1e-12)
                chosen.append(int(fits[np.argmin(table.errors[i][fits])]) if len(fits) else smallest[i])
            return chosen

        found = largest_fitting(problem, choose)
        if found is None and small:
            found = largest_fitting(problem, lambda fraction: choose(fraction, frozenset()))
        return pick(problem, top_up(table, smallest if found is None else found))


def _small(table: Table, share: float) -> frozenset[int]:
    """The smallest sites, as many as together hold at most a share of the sites' cost in every bounded resource."""
    if not table.loads:
        return frozenset()
    dense = np.array([loads[0] for loads in table.loads])
    order = np.argsort((dense / np.maximum(dense.sum(0), 1e-300)).max(1), kind="stable")
    held = (np.cumsum(dense[order], axis=0) / np.maximum(dense.sum(0), 1e-300)).max(1)
    return frozenset(order[held <= share].tolist())

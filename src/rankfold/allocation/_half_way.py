"""Half of the way from the global choice to an even one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankfold.allocation._base import RankSelector, Table, pick, top_up
from rankfold.allocation._lagrangian import Lagrangian
from rankfold.allocation._uniform import Uniform
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_number
from rankfold.registry import register


@register("half-way")
@dataclass(frozen=True)
class HalfWay(RankSelector):
    """Every site may cost the mean of what `Lagrangian` and `Uniform` give it: `(1 − ε) c_L + ε c_U`.

    Curves of few samples are estimates, and the global choice cuts deepest where an estimate happens to be too low; an
    even choice does not depend on them. Of the options that cost at most the mean in every bounded resource the one of
    least error is taken, so the bounds hold because they hold for both. Where a site has none (several bounds, two
    families), it gets the option of the global choice, and the global choice is returned if the result breaks a bound.
    The rest of the budget is spent step by step where it removes most error.

    Attributes:
        evenness: Weight ε of `Uniform`, in [0, 1]: 0 is `Lagrangian`, 1 `Uniform`.
    """

    evenness: float = 0.5

    def __post_init__(self) -> None:
        law, cure = "a number in [0, 1]", "leave it out, or pass 0.5"
        check_number("HalfWay.evenness", self.evenness, law=law, cure=cure, high=1)

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        best, even = (each.select(problem) for each in (Lagrangian(), Uniform()))
        chosen = []
        for i, (mine, theirs) in enumerate(zip(best, even, strict=True)):
            first, second = (problem.options[i].index(option) for option in (mine, theirs))
            costs, errors = table.costs[i], table.errors[i]
            allowed = (1 - self.evenness) * costs[first] + self.evenness * costs[second]
            fits = np.flatnonzero((costs <= allowed).all(1))
            chosen.append(int(fits[np.argmin(errors[fits])]) if len(fits) else first)
        if not problem.fits(problem.total(pick(problem, chosen))):
            return best
        return pick(problem, top_up(table, chosen))

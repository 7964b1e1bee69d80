"""The smallest rank within an error that is given."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.allocation._base import RankSelector, Table, cheaper, pick, within
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_number
from rankfold.registry import register


@register("error-bound")
@dataclass(frozen=True)
class ErrorBound(RankSelector):
    """The cheapest option of each site whose relative error is at most ε: "keep 95 % of the energy" is ε = 0.05.

    The error is relative to that of losing the site's whole output: `tr(G D A Dᵀ)/tr(G W A Wᵀ)`, which without
    gradients (`weighting=False`) is the energy of the output's error over the energy of the output. The rule is local:
    a budget may be left out, and is an error where the rule does not keep it. `Energy` finds ε from the budget.

    Attributes:
        error: The bound ε, in [0, 1].
    """

    error: float = 0.05

    def __post_init__(self) -> None:
        check_number("ErrorBound.error", self.error, law="a number in [0, 1]", cure="try 0.05", high=1)

    @property
    def local(self) -> bool:
        """See `RankSelector.local`."""
        return True

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        chosen = []
        for i, options in enumerate(problem.options):
            best = 0
            for k, option in enumerate(options):
                if option.relative <= self.error:
                    best = cheaper(table, i, best, k)
            chosen.append(best)
        return within(self, problem, pick(problem, chosen))

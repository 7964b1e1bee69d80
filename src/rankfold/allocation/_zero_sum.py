"""Cuts whose first-order effects on the loss cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation._base import RankSelector, Table, pick, top_up
from rankfold.allocation._lagrangian import cheapest
from rankfold.allocation.curve import Option, Problem
from rankfold.errors import OptionError
from rankfold.registry import register


@register("zero-sum")
@dataclass(frozen=True)
class ZeroSum(RankSelector):
    """One singular component after the other goes, so that the predicted changes of the loss add up to about zero.

    Removing component i of `Ŵ = Σ_i u_i u_iᵀ W` changes the loss by `c_i = −u_iᵀ G Wᵀ u_i` to first order, `G` its
    gradient by `W`; some changes raise it, some lower it. At every step each site offers its next smaller rank; of the
    offers whose sign is opposite to the running sum of changes the one of least size is taken (of all, where there is
    none), until the budget holds. The rest of the budget is spent where it removes most error.

    The loss is the cross-entropy of the data's labels or, without any, of the network's own decisions. Of several
    families at a site the first counts whose ranks are nested (`SVD`, `WhitenedSVD`, `ASVD`, and these by pivots).

    Errors:
        OptionError: No family has ranks that are nested.
        DataError: The outputs are no scores of classes.
        BudgetError: The smallest ranks of these families are above the budget.

    References:
        Zero-Sum SVD, arXiv 2602.02848, with `g_i = u_iᵀ (G L⁻ᵀ) v_i`, `A = W L`, and changes `−σ_i g_i`, which is the
        same without the inverse. There any component of a site may go; we keep the order of the singular values, since
        ranks are what plans hold.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        """ "changes"."""
        return ("changes",)

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        if not problem.options:
            return ()
        ladders = [_ladder(problem, i) for i in range(len(problem.options))]
        if all(len(own) < 2 for own in ladders) and any(len(options) > 1 for options in problem.options):
            raise OptionError(
                "families",
                law="ZeroSum() needs a family whose ranks are nested",
                got="none with predicted changes of the loss",
                cure="pass families=[rankfold.WhitenedSVD()]",
            )
        kept = tuple(tuple(problem.options[i][k] for k, _ in own) for i, own in enumerate(ladders))
        problem = replace(problem, options=kept).checked()
        table = Table.of(problem)
        changes = [np.array([change for _, change in own]) for own in ladders]
        chosen = _descent(problem, table, changes)
        return pick(problem, top_up(table, cheapest(problem, table) if chosen is None else chosen))


def _descent(problem: Problem, table: Table, changes: Sequence[NDArray[np.float64]]) -> list[int] | None:
    """Steps down, until the budget holds; None where the least of all sites does not."""
    chosen, running = [0] * len(changes), 0.0
    while not problem.fits(problem.total(pick(problem, chosen))):
        open_ = [i for i, own in enumerate(changes) if chosen[i] + 1 < len(own)]
        if not open_:
            return None
        steps = np.array([changes[i][chosen[i] + 1] - changes[i][chosen[i]] for i in open_])
        against = steps * running <= 0
        size = np.abs(steps)
        best = int(np.argmin(np.where(against, size, np.inf) if against.any() else size))
        running += float(steps[best])
        chosen[open_[best]] += 1
    return chosen


def _ladder(problem: Problem, site: int) -> list[tuple[int, float]]:
    """Positions of the dense option and of those of one family, by falling rank, with their changes of the loss."""
    options, path = problem.options[site], problem.sites[site].path
    for method in dict.fromkeys(option.method for option in options[1:]):
        known = None if method is None else problem.changes.get((path, method))
        if known is None:
            continue
        own = [(k, option.rank) for k, option in enumerate(options) if option.method == method]
        steps = [(k, known[rank]) for k, rank in own if rank is not None and rank in known]
        return [(0, 0.0), *sorted(steps, key=lambda step: -_rank(options[step[0]]))]
    return [(0, 0.0)]


def _rank(option: Option) -> int:
    return option.rank if isinstance(option.rank, int) else 0

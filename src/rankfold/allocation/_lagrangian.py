"""One exchange rate between error and cost for the whole network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation._base import RankSelector, Table, largest_fitting, pick, top_up
from rankfold.allocation.curve import Option, Problem
from rankfold.errors import BudgetError
from rankfold.registry import register

ROUNDS = 24  # rounds of the search for the balance between several bounds


@register("lagrangian")
@dataclass(frozen=True)
class Lagrangian(RankSelector):
    """Least summed relative error under the budget: `min Σ_i e_i(o_i)` subject to `Σ_i c_i(o_i) ≤ B`.

    For a multiplier λ every site takes `argmin e + λ Σ_b w_b c_b/B_b` on its own; λ is the smallest that fits, found by
    bisection. With several bounds the weights w are moved towards the bound that is broken most (multiplicative
    weights), and the best choice that fits all is kept. The rest of the budget is spent greedily.

    References:
        Everett, Operations Research 11, 1963 (generalised Lagrange multipliers). The same rule is used by BALF; we
        differ in several bounds at once and in errors relative to each site's output energy.
    """

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        resources = len(problem.bounds)
        weights = np.full(resources, 1 / resources)
        best: list[int] | None = None
        for _ in range(ROUNDS if resources > 1 else 1):
            found = largest_fitting(problem, lambda t, w=weights: _at(table, w, t))  # type: ignore[misc]
            if found is not None and (best is None or table.error(found) < table.error(best)):
                best = found
            load = table.load(found if found is not None else _at(table, weights, 0.0))
            weights = weights * np.exp(4 * (load - load.max()))
            weights = weights / weights.sum()
        if best is None:
            best = cheapest(problem, table)
        return pick(problem, top_up(table, best))


def _at(table: Table, weights: NDArray[np.float64], t: float) -> list[int]:
    """The choice at a multiplier: t = 0 is an infinite one (cheapest), t = 1 none (least error)."""
    if t >= 1:
        return table.choose(lambda i: table.errors[i] + 1e-15 * (table.loads[i] @ weights))
    if t <= 0:
        return table.choose(lambda i: table.loads[i] @ weights)
    multiplier = 10 ** (16 * (0.5 - t))  # 1e8 … 1e-8
    return table.choose(lambda i: table.errors[i] + multiplier * (table.loads[i] @ weights))


def cheapest(problem: Problem, table: Table) -> list[int]:
    """The cheapest choice within the bounds, which balances several bounds.

    Raises:
        BudgetError: Bounds that can be met one by one, but not together.
    """
    resources = len(problem.bounds)
    weights = np.full(resources, 1 / resources)
    for _ in range(ROUNDS * 8):
        chosen = _at(table, weights, 0.0)
        if problem.fits(problem.total(pick(problem, chosen))):
            return chosen
        load = table.load(chosen)
        weights = weights * np.exp(load - load.max())
        weights = weights / weights.sum()
    total = (problem.total(pick(problem, chosen)) + problem.fixed).amounts()
    whole = {name: bound + problem.fixed.amounts()[name] for name, bound in problem.bounds.items()}
    raise BudgetError(
        "Budget",
        law="all bounds can be met together",
        got=f"bounds {whole}, nearest choice {total}",
        cure="raise one of the bounds",
        smallest={name: total[name] for name in whole},
    )

"""The choice of least summed error, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation._base import RankSelector, Table, pick, top_up
from rankfold.allocation._lagrangian import Lagrangian
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_count
from rankfold.registry import register

ROUNDS = 400  # steps of the search for the multipliers
SLACK = 1e-12  # relative rounding of a sum of errors


@dataclass(frozen=True)
class Solution:
    """A choice, and how far from the best it can be.

    Attributes:
        chosen: Position of the option of each site.
        error: Its summed error.
        least: Lower bound on the summed error of any choice that fits; `error` itself where the choice is exact.
        start: Summed error of the choice by `Lagrangian`, from which the search started.
    """

    chosen: tuple[int, ...]
    error: float
    least: float
    start: float

    @property
    def gap(self) -> float:
        """By how much `Lagrangian` is above the least error, relative to its own; 0 where it cannot be improved."""
        return (self.start - self.error) / self.start if self.start > 0 else 0.0


@register("knapsack")
@dataclass(frozen=True)
class Knapsack(RankSelector):
    """Least summed error under the budget, exactly: `min Σ_i e_i(o_i)` subject to `Σ_i c_i(o_i) ≤ B`.

    A multiple-choice knapsack, solved by dynamic programming over the sites. For multipliers λ ≥ 0 no choice that fits
    is below `Σ_i min_o [e_i(o) + λ·c_i(o)] − λ·B`; with λ at the best such bound and the choice of `Lagrangian` as what
    is to be beaten, an option, or a partial choice of the first sites, whose bound is above that is left out, and so is
    a partial choice that another one beats in every cost and in its error. What is left of a few hundred options a site
    is a few, so the exact answer takes a fraction of a second; `Lagrangian` is rarely a percent above it.

    Attributes:
        states: Largest number of partial choices kept. Where there would be more, those of the lowest bound stay, and
            the choice is the best found instead of the best there is: `solve` tells how far off it can be.

    References:
        Dudziński, Walukiewicz, European Journal of Operational Research 28, 1987, for the bounds; Pisinger, EJOR 83,
        1995. We differ in several bounds at once.
    """

    states: int = 200_000

    def __post_init__(self) -> None:
        check_count("Knapsack.states", self.states, cure="leave it out")

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        return pick(problem, self.solve(problem).chosen)

    def solve(self, problem: Problem) -> Solution:
        """The choice, with a bound on what any other can do."""
        table = Table.of(problem)
        first = [options.index(o) for options, o in zip(problem.options, Lagrangian().select(problem), strict=True)]
        start = table.error(first)
        prices = _multipliers(table, start)
        reduced = [e + loads @ prices for e, loads in zip(table.errors, table.loads, strict=True)]
        below = [float(each.min()) for each in reduced]
        bound = sum(below) - float(prices.sum())
        limit = start + SLACK * max(start, 1.0)
        kept = [np.flatnonzero(bound + own - least <= limit) for own, least in zip(reduced, below, strict=True)]
        order = sorted(range(len(kept)), key=lambda i: len(kept[i]), reverse=True)
        each = [costs[k].min(0) for costs, k in zip(table.costs, kept, strict=True)]
        cheapest = np.array(each, dtype=np.int64).reshape(len(kept), len(table.bounds))
        left = cheapest.sum(0)  # the least that the sites which are not decided yet cost

        errors, costs = np.zeros(1), np.zeros((1, len(table.bounds)), dtype=np.int64)
        over, back, dropped = np.zeros(1), [], np.inf
        for i in order:
            own = kept[i]
            left = left - cheapest[i]
            parent = np.repeat(np.arange(len(errors)), len(own))
            option = np.tile(own, len(errors))
            errors = errors[parent] + table.errors[i][option]
            costs = costs[parent] + table.costs[i][option]
            over = over[parent] + (reduced[i] - below[i])[option]  # by how much the bound is above the best
            fits = (costs + left <= table.bounds).all(1) & (bound + over <= limit)
            some = np.flatnonzero(fits)
            some = some[_undominated(errors[some], costs[some])]
            if len(some) > self.states:
                some = some[np.argsort(over[some], kind="stable")]
                dropped = min(dropped, bound + float(over[some[self.states]]))
                some = np.sort(some[: self.states])
            if not len(some):
                return Solution(tuple(first), start, min(dropped, start), start)
            errors, costs, over = errors[some], costs[some], over[some]
            back.append((parent[some], option[some]))
        state = int(errors.argmin()) if len(errors) else 0
        chosen = list(first)
        for i, (parent, option) in zip(reversed(order), reversed(back), strict=True):
            chosen[i] = int(option[state])
            state = int(parent[state])
        best = min((chosen, first), key=table.error)
        best = top_up(table, best)
        error = table.error(best)
        return Solution(tuple(best), error, min(dropped, error), start)


def _multipliers(table: Table, start: float) -> NDArray[np.float64]:
    """Multipliers, in shares of the bounds, at which the lower bound on the error is highest: by subgradients.

    The step is Polyak's, towards the error of a choice that fits.
    """
    resources = len(table.bounds)
    best, prices = -np.inf, np.zeros(resources)
    now, length = np.zeros(resources), 1.0
    for round_ in range(ROUNDS):
        chosen = table.choose(lambda i, p=now: table.errors[i] + table.loads[i] @ p)  # type: ignore[misc]
        slope = table.load(chosen) - 1.0 * (table.bounds > 0)
        value = table.error(chosen) + float(now @ slope)
        if value > best:
            best, prices = value, now
        elif round_ % 10 == 9:
            length /= 2
        norm = float(slope @ slope)
        if norm <= 0 or start - value <= 0:
            break
        now = np.maximum(0.0, prices + length * (start - value) / norm * slope)
    return prices


def _undominated(errors: NDArray[np.float64], costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions, in order, of those that none beats in error and cost; of equal ones the first stays.

    With several costs only those of equal error are compared, each with the one before it.
    """
    order = np.lexsort((*costs.T[::-1], errors)) if costs.shape[1] > 1 else np.lexsort((errors, costs[:, 0]))
    if costs.shape[1] == 1:
        falling = errors[order]
        least = np.minimum.accumulate(np.concatenate(([np.inf], falling[:-1])))
        return np.sort(order[falling < least])
    same = (np.diff(errors[order]) == 0) & (np.diff(costs[order], axis=0) >= 0).all(1)
    return np.sort(order[np.concatenate(([True], ~same))])

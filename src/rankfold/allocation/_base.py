"""Base classes of selectors, and the arithmetic they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation.curve import Option, Problem
from rankfold.comparison.objectives import Objective
from rankfold.errors import BudgetError
from rankfold.registry import name_of


class Selector:
    """Rule that chooses sizes under a budget: ranks of factors, or numbers of channels that stay.

    Attributes:
        chooses: Kind of the sizes, "ranks" or "widths"; it is used for families with this `Family.sized_by`.
    """

    chooses: ClassVar[str] = "ranks"

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the data that it needs beside costs and errors; a problem has them only on request."""
        return ()


class RankSelector(Selector, ABC):
    """Curves + budget → one option per site. A subclass is a frozen, registered dataclass in a file of its own.

    A selector that `reads` "spectra" finds the singular values of every site in `problem.spectra`; one that reads
    "evaluate" can have any choice carried out and judged by `problem.evaluate`.
    """

    @property
    def multiple(self) -> int:
        """Divisor of every rank it chooses: methods with a grid of ranks then offer multiples of it."""
        return 1

    @property
    def lowers(self) -> Objective | None:
        """What `problem.evaluate` returns; None is the divergence by which candidates are judged."""
        return None

    @property
    def local(self) -> bool:
        """True if it chooses each site's option without looking at the budget, which may then be left out."""
        return False

    @abstractmethod
    def select(self, problem: Problem) -> tuple[Option, ...]:
        """Choose one option per site so that every bound holds.

        Args:
            problem: Options and bounds; known to have a solution for each bound alone.

        Returns:
            One of `problem.options[i]` for every site i.

        Raises:
            BudgetError: Several bounds that can be met one by one, but not together.
        """


@dataclass(frozen=True, eq=False)
class Table:
    """A problem as arrays.

    Attributes:
        errors: Arrays of errors, one per site, shape (options,).
        costs: Arrays of costs, one per site, shape (options, resources), in whole numbers.
        bounds: Upper bounds on the summed costs of a choice, shape (resources,).
        loads: Costs as shares of the bounds, for scores that weigh resources against each other.
    """

    errors: list[NDArray[np.float64]]
    costs: list[NDArray[np.int64]]
    bounds: NDArray[np.int64]
    loads: list[NDArray[np.float64]]

    @classmethod
    def of(cls, problem: Problem) -> Table:
        """The arrays of a problem."""
        names = list(problem.bounds)
        bounds = np.array([min(problem.bounds[name], 2**62) for name in names], dtype=np.int64)  # fits in 64 bits
        errors = [np.array([option.error for option in each], dtype=np.float64) for each in problem.options]
        costs = [
            np.array([[option.cost.amounts()[name] for name in names] for option in each], dtype=np.int64)
            for each in problem.options
        ]
        return cls(errors, costs, bounds, [each / np.maximum(bounds, 1) for each in costs])

    def choose(self, score: Callable[[int], NDArray[np.float64]]) -> list[int]:
        """The option of least score at every site (the first on ties)."""
        return [int(np.argmin(score(i))) for i in range(len(self.errors))]

    def load(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """Summed loads of a choice, shape (resources,)."""
        total = self.cost(chosen) / np.maximum(self.bounds, 1)
        return np.asarray(total, dtype=np.float64)

    def cost(self, chosen: Sequence[int]) -> NDArray[np.int64]:
        """Summed costs of a choice, shape (resources,)."""
        picked = [costs[k] for costs, k in zip(self.costs, chosen, strict=True)]
        return np.sum(picked, axis=0, dtype=np.int64) if picked else np.zeros_like(self.bounds)

    def error(self, chosen: Sequence[int]) -> float:
        """Summed errors of a choice."""
        return float(sum(errors[k] for errors, k in zip(self.errors, chosen, strict=True)))


def top_up(table: Table, chosen: Sequence[int]) -> list[int]:
    """Spend the rest of the budget: repeat the step that fits and removes most error per share of the budget.

    Args:
        table: The problem as arrays.
        chosen: A choice within the bounds.

    Returns:
        A choice within the bounds, of no larger error, from which no single step that fits removes error.
    """
    chosen = list(chosen)
    while True:
        left = table.bounds - table.cost(chosen)
        best, step = 0.0, None
        for i, k in enumerate(chosen):
            gain = table.errors[i][k] - table.errors[i]
            fits = (table.costs[i] - table.costs[i][k] <= left).all(1) & (gain > 0)
            if not fits.any():
                continue
            more = (table.loads[i] - table.loads[i][k]).max(1)
            worth = np.where(fits, gain / np.maximum(more, 1e-9), 0.0)
            j = int(np.argmax(worth))
            if worth[j] > best:
                best, step = float(worth[j]), (i, j)
        if step is None:
            return chosen
        chosen[step[0]] = step[1]


def cheaper(table: Table, site: int, first: int, second: int) -> int:
    """The option of a site that costs less, and of two that cost the same the one of less error."""
    costs = [(float(table.loads[site][k].max()), float(table.errors[site][k]), k) for k in (first, second)]
    return min(costs)[2]


def within(selector: RankSelector, problem: Problem, chosen: Sequence[Option]) -> tuple[Option, ...]:
    """A choice that did not look at the budget, if it keeps it.

    Raises:
        BudgetError: It does not; what it reaches is named.
    """
    total = problem.total(chosen)
    if not problem.fits(total):
        reached = (total + problem.fixed).amounts()
        whole = {name: bound + problem.fixed.amounts()[name] for name, bound in problem.bounds.items()}
        raise BudgetError(
            "Budget",
            law=f"{name_of(selector)}, which does not look at it, keeps within it",
            got=f"bounds {whole}, the rule reaches { ({name: reached[name] for name in whole}) }",
            cure="raise the bounds, make the rule stricter, or leave the budget out",
            smallest={name: reached[name] for name in whole},
        )
    return tuple(chosen)


def pick(problem: Problem, chosen: Sequence[int]) -> tuple[Option, ...]:
    """The options at the chosen positions."""
    return tuple(options[k] for options, k in zip(problem.options, chosen, strict=True))


def largest_fitting(problem: Problem, choose: Callable[[float], list[int]], *, steps: int = 40) -> list[int] | None:
    """The choice at the largest t in [0, 1] that is within the bounds, by bisection.

    Args:
        problem: The problem.
        choose: Function from t to a choice, which costs more as t grows.
        steps: Number of halvings.

    Returns:
        The choice, or None where not even t = 0 fits.
    """

    def fits(chosen: list[int]) -> bool:
        return problem.fits(problem.total(pick(problem, chosen)))

    if fits(top := choose(1.0)):
        return top
    if not fits(found := choose(0.0)):
        return None
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        trial = choose(middle)
        if fits(trial):
            low, found = middle, trial
        else:
            high = middle
    return found

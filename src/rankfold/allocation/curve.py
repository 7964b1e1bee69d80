"""One site, one family: candidate ranks with their cost and error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import Budget, Cost
from rankfold.decompositions import Decomposition, Spectrum
from rankfold.factors import Rank
from rankfold.sites.reach import NOTHING_SMALLER, unreachable
from rankfold.sites.site import Site, Sites

Changes: TypeAlias = Mapping[tuple[str, Decomposition], Mapping[Rank, float]]
Spectra: TypeAlias = Mapping[tuple[str, Decomposition], tuple[tuple[Spectrum, ...], ...]]


@dataclass(frozen=True)
class RankCurve:
    """Candidate ranks of a method at a site, with the cost and error of each.

    Attributes:
        site: The site.
        method: The method.
        ranks: Candidate ranks, cheapest first.
        costs: Costs of the site, one per rank.
        errors: Errors, one per rank, comparable across sites; see `measure` for their meaning.
        energy: Error of losing the site's whole output, in the same unit.
    """

    site: Site
    method: Decomposition
    ranks: tuple[Rank, ...]
    costs: tuple[Cost, ...]
    errors: tuple[float, ...]
    energy: float = 1.0

    def scaled(self, factor: float) -> RankCurve:
        """The curve with its errors multiplied by a factor."""
        return replace(self, errors=tuple(error * factor for error in self.errors), energy=self.energy * factor)


@dataclass(frozen=True)
class Option:
    """One possible decision about a site: dense (`method` None), or a method at a rank.

    Attributes:
        method: The method.
        rank: Its rank.
        cost: Cost of the site.
        error: Error, comparable across sites.
        whole: Error of losing the site's whole output, against which that of the option is a share.
    """

    method: Decomposition | None
    rank: Rank | None
    cost: Cost
    error: float
    whole: float = 1.0

    @property
    def relative(self) -> float:
        """The error as a share of that of losing the site's whole output."""
        return self.error / self.whole if self.whole > 0 else float(self.error > 0)


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of all sites and families, with the data of the model that a selector needs.

    Attributes:
        sites: The measured sites.
        curves: Curves, one per site and family that applies there, in the order of the sites, then of the families.
        spectra: Singular values that the ranks of a family truncate at a site, by site and family, one tuple per group;
            empty unless they were requested.
        changes: Predicted change of the loss at every rank of a family, by site and family; empty unless requested.
        unit: What losing every site's output costs a site on average, in the squared change of the network's output:
            the unit of the errors; 1 where they are relative to each site's output.
        factors: Factor by which the errors of a site were multiplied, since a cut there was measured to cost more than
            predicted, or less, by path; empty where nothing was measured.
        cost: Divergence of the outputs that was measured for an error of 1, in the median over the sites; None where
            nothing was measured.
    """

    sites: Sites
    curves: tuple[RankCurve, ...]
    spectra: Spectra = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    unit: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    cost: float | None = None

    def __iter__(self) -> Iterator[RankCurve]:
        """The curves."""
        return iter(self.curves)

    def __len__(self) -> int:
        """Number of curves."""
        return len(self.curves)

    def scaled(self, factors: Mapping[str, float], cost: float | None = None) -> Curves:
        """The curves with the errors of each site multiplied by a factor, as far as there is one.

        Args:
            factors: Factors by path.
            cost: See `Curves`.
        """
        return replace(
            self,
            curves=tuple(each.scaled(factors.get(each.site.path, 1.0)) for each in self),
            factors=factors,
            cost=cost,
        )

    def of(self, site: Site) -> list[RankCurve]:
        """All curves of a site."""
        return [curve for curve in self.curves if curve.site.path == site.path]

    def fixed_cost(self) -> Cost:
        """Cost of all that no decision changes: the model without its sites."""
        total = self.sites.cost
        for site in self.sites:
            total = total - dense_cost(site)
        return total

    def problem(self, budget: Budget) -> Problem:
        """The choice to be made under a budget; see `Problem`."""
        return Problem.of(self, budget)


@dataclass(frozen=True, eq=False)
class Problem:
    """The options of each site, and the bounds on the sum of their costs.

    Attributes:
        sites: The sites.
        options: Options of each site: the dense one first, then those that cost less in a bounded resource.
        bounds: Absolute bounds on the sites' summed cost, by resource: the model's bound less the fixed cost.
        fixed: Cost of all that no decision changes.
        original: Cost of the whole original model.
        found: Sites with the data of the whole model, to name what blocks a budget; None for a problem without a model.
        spectra: Singular values as in `Curves`, for selectors that read "spectra".
        changes: Changes of the loss as in `Curves`, for selectors that read "changes".
        evaluate: Function that carries a choice out on a part of the samples and returns the divergence of its outputs
            on held-out ones, less being better; None unless a selector that reads "evaluate" is used.
    """

    sites: tuple[Site, ...]
    options: tuple[tuple[Option, ...], ...]
    bounds: dict[str, int]
    fixed: Cost
    original: Cost
    found: Sites | None = None
    spectra: Spectra = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    evaluate: Callable[[Sequence[Option]], float] | None = None

    @classmethod
    def of(cls, curves: Curves, budget: Budget) -> Problem:
        """Build the problem and check that the budget can be met.

        Raises:
            BudgetError: The cheapest options together are over a bound; the smallest reachable values are named.
        """
        budget.check_counted(curves.sites.uncounted)
        whole = budget.bounds(curves.sites.cost)
        fixed = curves.fixed_cost()
        bounds = {name: bound - fixed.amounts()[name] for name, bound in whole.items()}
        options = []
        for site in curves.sites:
            dense = Option(None, None, dense_cost(site), 0.0)
            smaller = [
                Option(curve.method, rank, cost, error, curve.energy)
                for curve in curves.of(site)
                for rank, cost, error in zip(curve.ranks, curve.costs, curve.errors, strict=True)
                if any(cost.amounts()[name] < dense.cost.amounts()[name] for name in bounds)
            ]
            options.append((dense, *smaller))
        found = curves.sites, curves.spectra, curves.changes
        return cls(curves.sites.sites, tuple(options), bounds, fixed, curves.sites.whole, *found).checked()

    def checked(self) -> Problem:
        """This problem, if the cheapest options together are within every bound.

        Raises:
            BudgetError: They exceed a bound; the smallest reachable value of each resource is named.
        """
        fixed = self.fixed.amounts()
        smallest = {
            name: fixed[name] + sum(min(o.cost.amounts()[name] for o in each) for each in self.options)
            for name in self.bounds
        }
        whole = {name: bound + fixed[name] for name, bound in self.bounds.items()}
        if any(smallest[name] > bound for name, bound in whole.items()):
            dense = [site for site, each in zip(self.sites, self.options, strict=True) if len(each) == 1]
            frozen = {site.path: site.fixed or NOTHING_SMALLER for site in dense}
            raise unreachable(self.original, whole, smallest, sites=self.found, frozen=frozen)
        return self

    def restricted(self, keep: Callable[[Option], bool]) -> Problem:
        """This problem with only the options that `keep` accepts; the dense one always stays.

        Raises:
            BudgetError: The remaining options cannot meet a bound.
        """
        options = tuple((each[0], *(option for option in each[1:] if keep(option))) for each in self.options)
        return replace(self, options=options).checked()

    def total(self, choice: Sequence[Option]) -> Cost:
        """Summed cost of the sites under a choice."""
        return sum((option.cost for option in choice), Cost())

    def fits(self, cost: Cost) -> bool:
        """Whether a summed cost is within every bound."""
        amounts = cost.amounts()
        return all(amounts[name] <= bound for name, bound in self.bounds.items())

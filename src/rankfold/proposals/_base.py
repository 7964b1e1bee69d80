"""Plans worth trying under a budget: the interface of all kinds of families, and the registry of those kinds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import nn

from rankfold.allocation import Budget, Selector
from rankfold.clock import Clock
from rankfold.comparison.objectives import Objective
from rankfold.cost.rates import Rates
from rankfold.cost.resources import Cost
from rankfold.data.batches import Batch
from rankfold.decompositions import Family
from rankfold.errors import BudgetError, RegistryError
from rankfold.plan import Plan
from rankfold.plan.repair import Lockstep
from rankfold.progress import Progress
from rankfold.proposals._measured import Cuts
from rankfold.sites.site import Site, Sites
from rankfold.statistics import Statistics
from rankfold.store.work import Work

P = TypeVar("P", bound="type[Proposer]")
_PROPOSERS: dict[type[Family], type[Proposer]] = {}


@dataclass(frozen=True, eq=False)
class Basis:
    """A measured model: the data that proposals are made from, whatever the budget.

    Attributes:
        model: The original.
        example: One batch.
        sites: Sites of the model.
        stats: Statistics of the model.
        families: All methods that may be used.
        seed: Seed of everything that is drawn.
        work: Store of finished results.
        clock: Clock that adds up the seconds of each stage.
        progress: Callback for every step.
        notes: Remarks for the report; a proposer adds to them.
        cuts: Cuts that are carried out one at a time, on the original; None where errors are as predicted.
    """

    model: nn.Module
    example: Batch
    sites: Sites
    stats: Statistics
    families: tuple[Family, ...]
    seed: int
    work: Work
    clock: Clock
    progress: Progress
    notes: list[str]
    cuts: Cuts | None = None


@dataclass(frozen=True)
class Asked:
    """Request that proposals have to meet.

    Attributes:
        budget: Upper bounds on the whole model.
        selector: The selector that the caller gave, which is then used as it is; None is each of the defaults.
        repair: The repair, recorded in the plans; None for none.
        evaluate: Function that carries a plan out on a part of the samples and returns an objective, without one the
            divergence of its outputs, for selectors that read it.
    """

    budget: Budget
    selector: Selector | None
    repair: Lockstep | None
    evaluate: Callable[[Plan, Objective | None], float] | None = None


@dataclass(frozen=True)
class Proposal:
    """A plan worth trying, before it is made.

    Attributes:
        name: Name of the plan in the report.
        make: Function that makes the plan.
        always: True if it is tried also where held-out samples are too few to choose among many.
    """

    name: str
    make: Callable[[], Plan]
    always: bool = True


@dataclass(frozen=True, eq=False)
class Outlook:
    """A model of which only the speed was measured yet: the data that forecasts are made from.

    Attributes:
        model: The original.
        sites: Sites of the model.
        rates: Measured speeds of this machine.
        forward: Seconds per sample of a forward pass.
        batch: Number of samples in a batch.
        spent: Function that records seconds at a site, and returns them.
    """

    model: nn.Module
    sites: Sites
    rates: Rates
    forward: float
    batch: int
    spent: Callable[[Site, float], float] = lambda _, seconds: seconds


@dataclass(frozen=True)
class FamilyForecast:
    """Forecast of the families of one kind: the time that they take, and the sizes that they reach.

    Attributes:
        seconds: Seconds by stage, without those of collecting statistics and of carrying plans out.
        smallest: Smallest cost of the whole model in each resource.
        reduced: Paths of the modules that get smaller.
    """

    seconds: Mapping[str, float]
    smallest: Cost
    reduced: frozenset[str]


class Proposer(ABC):
    """Maker of the proposals of one kind of family. It lives as long as the basis, so a second budget measures nothing.

    Args:
        basis: The measured model.
        families: Families of its kind among `basis.families`.
    """

    traces: ClassVar[bool] = True
    """True if its proposals read the graph of the model."""

    def __init__(self, basis: Basis, families: Sequence[Family]) -> None:
        self.basis, self.families = basis, tuple(families)
        self.beside: list[Proposer] = []  # proposers of the families of other kinds

    def on(self, basis: Basis) -> Proposer:
        """The same for the model without some branches, whose layers and statistics are some of this one's."""
        other = self._on(basis)
        other.beside = [each._on(basis) for each in self.beside]
        return other

    def _on(self, basis: Basis) -> Proposer:
        return type(self)(basis, self.families)

    @abstractmethod
    def proposals(self, asked: Asked) -> list[Proposal]:
        """Plans worth trying under a budget, none of them made yet."""

    @classmethod
    @abstractmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool) -> tuple[int, int]:
        """Largest number of proposals, known without a model.

        Args:
            families: Families of its kind.
            ranks: Number of all families that have ranks.
            chosen_by: True if the caller gave a selector.

        Returns:
            The number of all, and of those that are always tried.
        """

    @classmethod
    @abstractmethod
    def forecast(cls, outlook: Outlook, families: Sequence[Family], beside: Sequence[Family]) -> FamilyForecast:
        """Forecast of the time that making the proposals takes, and of the smallest model that they reach.

        Args:
            outlook: The model.
            families: Families of its kind.
            beside: Families of other kinds.
        """


def proposes(kind: type[Family]) -> Callable[[P], P]:
    """Register a class as the proposer of a kind of families."""

    def register(proposer: P) -> P:
        _PROPOSERS[kind] = proposer
        return proposer

    return register


def kinds_of(families: Sequence[Family]) -> dict[type[Proposer], list[Family]]:
    """The families by their proposer, in the order in which kinds were registered.

    Raises:
        RegistryError: A family has no proposer.
    """
    found: dict[type[Proposer], list[Family]] = {proposer: [] for proposer in _PROPOSERS.values()}
    for family in families:
        proposer = next((_PROPOSERS[base] for base in type(family).__mro__ if base in _PROPOSERS), None)
        if proposer is None:
            raise RegistryError(
                type(family).__qualname__,
                law="something makes plans of every kind of family",
                got="a kind that nothing proposes for",
                cure="derive from rankfold.Decomposition, or register a Proposer for the kind",
            )
        found[proposer].append(family)
    return {proposer: own for proposer, own in found.items() if own}


def proposers_of(basis: Basis) -> list[Proposer]:
    """The proposers of the families of a basis."""
    found = [proposer(basis, own) for proposer, own in kinds_of(basis.families).items()]
    for proposer in found:
        proposer.beside = [other for other in found if other is not proposer]
    return found


def numbers_of(families: Sequence[Family], *, chosen_by: bool) -> tuple[int, int]:
    """Largest numbers of plans that are made, where many are tried and where few are; see `Proposer.numbers`."""
    ranks = sum(family.sized_by == "ranks" for family in families)
    each = [proposer.numbers(own, ranks=ranks, chosen_by=chosen_by) for proposer, own in kinds_of(families).items()]
    return sum(many for many, _ in each), sum(few for _, few in each)


def family_forecasts(outlook: Outlook, families: Sequence[Family]) -> list[FamilyForecast]:
    """Forecasts of the families, one per kind; see `Proposer.forecast`."""
    kinds = kinds_of(families)
    return [proposer.forecast(outlook, own, [f for f in families if f not in own]) for proposer, own in kinds.items()]


def plans_from(proposals: Sequence[Proposal], bounds: Mapping[str, int]) -> dict[str, Plan]:
    """The plans by name, equal ones once; one that cannot be made under the budget drops out while another can.

    Args:
        proposals: Proposals; of two with one name the second gets a number.
        bounds: Bounds of the budget, by resource.

    Raises:
        BudgetError: No plan can be made; this is the error of the one that comes closest to the budget.
    """
    plans: dict[str, Plan] = {}
    failures: list[BudgetError] = []
    for proposal in proposals:
        try:
            plan = proposal.make()
        except BudgetError as cause:
            failures.append(cause)
            continue
        if all(_shape(plan) != _shape(other) for other in plans.values()):
            name, number = proposal.name, 1
            while name in plans:
                number += 1
                name = f"{proposal.name} ({number})"
            plans[name] = plan

    def excess(failure: BudgetError) -> float:
        reached = [value / max(bounds[name], 1) for name, value in failure.smallest.items() if name in bounds]
        return max(reached, default=math.inf)

    if not plans and failures:
        raise min(failures, key=excess)
    return plans


def _shape(plan: Plan) -> tuple[object, ...]:
    """The decisions of a plan, without predictions and reasons."""
    return [(each.site, each.method, each.rank) for each in plan.decisions], plan.cuts

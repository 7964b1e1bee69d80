"""Plans that cut ranks: of all families that have some together, and of each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

from rankfold.allocation import HalfWay, Lagrangian, RankSelector, Uniform
from rankfold.allocation.curve import Curves
from rankfold.allocation.measuring import measure
from rankfold.decompositions import Decomposition, Family
from rankfold.distributed import world
from rankfold.plan import Plan
from rankfold.plan.making import make_plan
from rankfold.proposals._base import Asked, Proposal, Proposer, proposes
from rankfold.registry import name_of


@proposes(Decomposition)
class RankProposer(Proposer):
    """Each selector with all families, with positions for independent, and with each family alone."""

    @property
    def forms(self) -> list[Decomposition]:
        """The families."""
        return [family for family in self.families if isinstance(family, Decomposition)]

    @cached_property
    def curves(self) -> Curves:
        """Of all families; measured once."""
        basis = self.basis

        def measured() -> Curves:
            return measure(
                basis.model,
                basis.stats,
                sites=basis.sites,
                families=self.forms,
                progress=basis.progress,
                world=world(),
            )

        return basis.clock.time("curves", lambda: basis.work.curves(basis.sites, self.forms, measured))

    def proposals(self, asked: Asked) -> list[Proposal]:
        """See `by_ranks`."""

        def make(curves: Curves, selector: RankSelector) -> Plan:
            return make_plan(
                curves,
                budget=asked.budget,
                selector=selector,
                seed=self.basis.seed,
                calibration=self.basis.stats.manifest,
                repair=asked.repair,
            )

        return by_ranks(self.curves, asked.selector if isinstance(asked.selector, RankSelector) else None, make)

    @classmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool, weighting: bool) -> tuple[int, int]:
        """See `Proposer.numbers`: curves with positions for independent make a plan more."""
        if chosen_by:
            return 1, 1
        return 3 + weighting + (len(families) if len(families) > 1 else 0), 3


def by_ranks(
    curves: Curves, selector: RankSelector | None, make: Callable[[Curves, RankSelector], Plan]
) -> list[Proposal]:
    """Ways to cut ranks: by each selector with all families, with positions for independent, with each family alone.

    How errors add up within a sample is measured for one layer at a time. Where it is much the same everywhere (in
    residual networks) its noise costs more than it tells, so a plan that takes positions for independent is tried too.

    A family alone is among what all together may choose, and prices say it is no better. But prices are estimates, and
    where a layer's neighbours are cut too a family may do better alone than in the choice: so it is tried.

    Args:
        curves: Of all families.
        selector: The one that was named, which is then taken as it is; None is each of the defaults.
        make: A plan from curves and a selector.
    """
    if selector is not None:
        return [Proposal(name_of(selector), partial(make, curves, selector))]
    methods = list(dict.fromkeys(curve.method for curve in curves))
    first = Lagrangian()
    found = [Proposal(name_of(each), partial(make, curves, each)) for each in (first, Uniform(), HalfWay())]
    if any(curve.independent is not None for curve in curves):
        found.append(
            Proposal(f"{name_of(first)}, independent", partial(make, curves.independent(), first), always=False)
        )
    for method in methods if len(methods) > 1 else ():
        own = replace(curves, curves=tuple(curve for curve in curves if curve.method == method))
        found.append(Proposal(f"{name_of(first)}, {name_of(method)} alone", partial(make, own, first), always=False))
    return found

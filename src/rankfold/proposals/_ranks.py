"""Plans that cut ranks, of all families that have some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rankfold.allocation import HalfWay, Lagrangian, RankSelector
from rankfold.allocation.curve import Curves
from rankfold.allocation.measuring import changes_of, coherences_at, fitted_error, measure, methods_at, spectra_of
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.decompositions import Decomposition, Family
from rankfold.distributed import world
from rankfold.factors import Rank
from rankfold.plan import Plan
from rankfold.plan.making import make_plan
from rankfold.proposals._base import Asked, Basis, FamilyForecast, Outlook, Proposal, Proposer, proposes
from rankfold.proposals._measured import SAMPLES, measured_sites
from rankfold.registry import name_of
from rankfold.sites.site import Site

HALVES = 2  # number of parts of the samples, between which curves are cross-fitted


@proposes(Decomposition)
class RankProposer(Proposer):
    """Proposer of ranks, by each selector."""

    traces = False

    def __init__(self, basis: Basis, families: Sequence[Family]) -> None:
        super().__init__(basis, families)
        self._curves: dict[int, Curves] = {}

    def _on(self, basis: Basis) -> RankProposer:
        """The curves of the layers that are left are those of this one."""
        other, left = RankProposer(basis, self.families), {site.path for site in basis.sites}
        for multiple, curves in self._curves.items():
            other._curves[multiple] = replace(
                curves,
                sites=basis.sites,
                curves=tuple(curve for curve in curves if curve.site.path in left),
                spectra={key: own for key, own in curves.spectra.items() if key[0] in left},
                changes={key: own for key, own in curves.changes.items() if key[0] in left},
            )
        return other

    @property
    def forms(self) -> list[Decomposition]:
        """The families."""
        return [family for family in self.families if isinstance(family, Decomposition)]

    def curves(self, multiple: int = 1, *, reads: Sequence[str] = ()) -> Curves:
        """Curves of all families, measured once; see `measured_sites` for their scale.

        Args:
            multiple: Divisor of the ranks of methods that have a grid of ranks.
            reads: Names of what a selector reads beside costs and errors.
        """
        basis, forms = self.basis, [form.at_multiples(multiple) for form in self.forms]

        def predicted() -> Curves:
            return measure(
                basis.model, basis.stats, sites=basis.sites, families=forms, progress=basis.progress, world=world()
            )

        def scaled() -> Curves:
            curves = basis.work.curves(basis.sites, forms, predicted)
            if basis.cuts is None:
                return curves
            told = coherences_at(basis.sites, basis.stats)

            def error(site: Site, method: Decomposition, rank: Rank) -> float:
                return fitted_error(basis.model, basis.stats, told, site=site, method=method, rank=rank)

            return measured_sites(curves, basis.cuts, error)

        if multiple not in self._curves:
            self._curves[multiple] = basis.clock.time("curves", scaled)
        curves = self._curves[multiple]
        if "spectra" in reads and not curves.spectra:
            found = basis.clock.time(
                "curves", lambda: spectra_of(basis.model, basis.stats, sites=basis.sites, families=forms)
            )
            curves = self._curves[multiple] = replace(curves, spectra=found)
        if "changes" in reads and not curves.changes:
            told = basis.clock.time(
                "curves", lambda: changes_of(basis.model, basis.stats, sites=basis.sites, families=forms)
            )
            curves = self._curves[multiple] = replace(curves, changes=told)
        return curves

    def proposals(self, asked: Asked) -> list[Proposal]:
        """See `by_ranks`."""
        selector = asked.selector if isinstance(asked.selector, RankSelector) else None
        multiple, reads = (1, ()) if selector is None else (selector.multiple, selector.reads)

        make = partial(self.plan, asked)
        return by_ranks(self.curves(multiple, reads=reads), selector, make)

    def plan(self, asked: Asked, curves: Curves, selector: RankSelector) -> Plan:
        """The plan of a selector.

        Args:
            asked: The request.
            curves: Curves of the ranks, from `curves`.
            selector: The selector.
        """
        return make_plan(
            curves,
            budget=asked.budget,
            selector=selector,
            seed=self.basis.seed,
            calibration=self.basis.stats.manifest,
            repair=asked.repair,
            evaluate=asked.evaluate,
        )

    @classmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool) -> tuple[int, int]:
        """See `Proposer.numbers`."""
        number = 1 if chosen_by else 2
        return number, number

    @classmethod
    def forecast(cls, outlook: Outlook, families: Sequence[Family], beside: Sequence[Family]) -> FamilyForecast:
        """See `Proposer.forecast`: curves need the errors of each method, and one cut a site.

        The least has all sites at the least rank.
        """
        forms = [family for family in families if isinstance(family, Decomposition)]
        least = {site.path: _least(site, forms) for site in outlook.sites}
        return FamilyForecast(
            {"curves": curve_seconds(outlook, forms) + len(outlook.sites) * SAMPLES[1] * outlook.forward},
            sum((least[site.path] - dense_cost(site) for site in outlook.sites), outlook.sites.cost),
            frozenset(site.path for site in outlook.sites if least[site.path] != dense_cost(site)),
        )


def curve_seconds(outlook: Outlook, forms: Sequence[Decomposition]) -> float:
    """Seconds of the errors of some methods at all ranks of all sites, fitted on one half and judged on the other."""
    total = 0.0
    for site in outlook.sites:
        shape = site.geometry.canonical_shape
        own = methods_at(site, forms)
        seconds = site.geometry.groups * HALVES * sum(outlook.rates.errors(form, shape) for form in own)
        total += outlook.spent(site, seconds)
    return total


def _least(site: Site, forms: Sequence[Decomposition]) -> Cost:
    """The least a site costs in each resource, at the smallest rank of any method."""
    costs, shape = [dense_cost(site)], site.geometry.canonical_shape
    costs += [site_cost(site, form.form, form.ranks(shape)[0]) for form in methods_at(site, forms)]
    return Cost(*(min(cost.amounts()[name] for cost in costs) for name in RESOURCES))


def by_ranks(
    curves: Curves, selector: RankSelector | None, make: Callable[[Curves, RankSelector], Plan]
) -> list[Proposal]:
    """Ways to cut ranks: by the global choice, and half of the way from it to an even one.

    Args:
        curves: Curves of all families.
        selector: The selector that the caller gave, which is then used as it is; None is each of the defaults.
        make: Function from curves and a selector to a plan.
    """
    if selector is not None:
        return [Proposal(name_of(selector), partial(make, curves, selector))]
    return [Proposal(name_of(each), partial(make, curves, each)) for each in (Lagrangian(), HalfWay())]

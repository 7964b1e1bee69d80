"""Plans that remove channels: alone, and with the families that have ranks for the rest of the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from rankfold.allocation import Curves, Lagrangian, RankSelector
from rankfold.channels.elimination import RemovalCurve, even
from rankfold.channels.groups import ChannelGroup, find_channels
from rankfold.channels.ledger import Ledger
from rankfold.channels.stacks import Widths, stacks_of
from rankfold.channels.widths import HALF_WAY, SIZES, WidthSelector
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.decompositions import Decomposition, Family, Interpolative
from rankfold.distributed import world
from rankfold.errors import SiteError
from rankfold.plan import Plan
from rankfold.plan.making import DIGITS
from rankfold.proposals._base import Asked, Basis, FamilyForecast, Outlook, Proposal, Proposer, proposes
from rankfold.proposals._measured import SAMPLES, measured_stacks
from rankfold.proposals._ranks import RankProposer, curve_seconds
from rankfold.proposals._remover import Remover
from rankfold.registry import name_of

# Time of the curves of a model without half of its channels, as a share of the time of those of the whole model.
NARROWER = 0.7


@dataclass(frozen=True)
class ChannelWay:
    """A way to remove channels.

    Attributes:
        name: Name of the proposal.
        share: Share of the way to the budget that removing channels covers; cutting ranks covers the rest.
        sizes: Selector of how many units of each group stay.
        selector: Selector of the ranks.
        always: True if it is always tried, as in `Proposal`.
        measured: True if the errors of channels are scaled by what plans of channels alone, and of ranks alone, were
            measured to lose.
    """

    name: str
    share: float
    sizes: WidthSelector
    selector: RankSelector
    always: bool
    measured: bool = False


@proposes(Interpolative)
class ChannelProposer(Proposer):
    """Proposer of plans that remove channels: alone, and weighed against ranks."""

    def __init__(self, basis: Basis, families: Sequence[Family]) -> None:
        super().__init__(basis, families)
        self._removers: dict[tuple[Interpolative, frozenset[str]], Remover | None] = {}
        self._factors: dict[Interpolative, dict[str, float]] = {}  # on the errors of channels, by family and group

    def _on(self, basis: Basis) -> ChannelProposer:
        """The scales of the groups that are left are those of this one's."""
        other = ChannelProposer(basis, self.families)
        other._factors = self._factors
        return other

    def proposals(self, asked: Asked) -> list[Proposal]:
        """Proposals for each family of its kind in each way."""
        multiple = asked.selector.multiple if isinstance(asked.selector, RankSelector) else 1
        forms = [form.at_multiples(multiple) for form in self.basis.families if isinstance(form, Decomposition)]
        ways = self._ways(asked)
        found = []
        ranks = next((each for each in self.beside if isinstance(each, RankProposer)), None)
        for method in self.families:
            if not isinstance(method, Interpolative):
                continue
            remover = self._remover(method, ways, alone=not forms)
            if remover is None:
                continue
            maker = _Maker(asked, self.basis.seed, remover, forms, ranks)
            for way in ways:
                measurable = asked.evaluate is not None and asked.repair is not None
                if not way.measured:  # where nothing can be measured, what is predicted stands in for it
                    found.append(Proposal(way.name, partial(maker.plan, way), always=way.always or not measurable))
                elif measurable:
                    found.append(Proposal(way.name, partial(maker.measured, way, ways[0]), always=way.always))
        return found

    def widths(self, asked: Asked, ranks: Curves | None) -> Widths | None:
        """The channels of the first family, as a `Ledger` reads them; None where none can go."""
        method = next(each for each in self.families if isinstance(each, Interpolative))
        remover = self._remover(method, self._ways(asked), alone=False)
        return None if remover is None else remover.widths(asked.budget, ranks=ranks)

    def _ways(self, asked: Asked) -> list[ChannelWay]:
        return channel_ways(
            asked.selector if isinstance(asked.selector, RankSelector) else None,
            asked.selector if isinstance(asked.selector, WidthSelector) else None,
            ranks=any(isinstance(form, Decomposition) for form in self.basis.families),
        )

    def _remover(self, method: Interpolative, ways: Sequence[ChannelWay], *, alone: bool) -> Remover | None:
        """The `Remover` of a method; None where no channels can be removed, and there are other families.

        Raises:
            SiteError: No channels can be removed, and there is nothing else.
        """
        key = method, frozenset(name for way in ways for name in way.sizes.reads)
        if key in self._removers:
            return self._removers[key]
        basis = self.basis
        try:
            remover = basis.clock.time(
                "curves",
                lambda: Remover.of(
                    basis.model,
                    basis.example,
                    basis.sites,
                    basis.stats,
                    method,
                    selectors=[way.sizes for way in ways],
                    seed=basis.seed,
                ),
            )
        except SiteError as cause:
            if alone:
                raise
            basis.notes.append(f"no channels were removed: {cause.got}")
            self._removers[key] = None
            return None
        ranks = next((each for each in self.beside if isinstance(each, RankProposer)), None)
        curves = None if ranks is None else ranks.curves(ways[0].selector.multiple)
        scaled = basis.clock.time("curves", lambda: self._measured(remover, curves))
        self._removers[key] = scaled
        return scaled

    def _measured(self, remover: Remover, curves: Curves | None) -> Remover:
        """A remover whose errors have measured scales, those of the ranks beside it too."""
        if remover.method not in self._factors and self.basis.cuts is not None:
            alone = partial(remover.alone, seed=self.basis.seed)
            own = measured_stacks(remover.curves, remover.stacks, alone, self.basis.cuts, curves)
            self._factors[remover.method] = own
        return remover.scaled(self._factors.get(remover.method, {}), {} if curves is None else curves.factors)

    @classmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool) -> tuple[int, int]:
        """See `Proposer.numbers`."""
        if ranks:
            many, few = 4, 3
        else:
            many = few = 1 if chosen_by else len(SIZES)
        return many * len(families), few * len(families)

    @classmethod
    def forecast(cls, outlook: Outlook, families: Sequence[Family], beside: Sequence[Family]) -> FamilyForecast:
        """See `Proposer.forecast`: groups are tried and ordered, and curves of narrower layers are measured anew."""
        if outlook.sites.graph.program is None:
            return FamilyForecast({}, outlook.sites.cost, frozenset())
        groups = [group for group in find_channels(outlook.model, outlook.sites) if even(group)]
        smallest = [_narrowest(outlook, groups, family) for family in families if isinstance(family, Interpolative)]
        least = [outlook.sites.cost, *smallest]
        made = {path for group in groups for path in (*group.made, *group.read)}
        carried = {name.rpartition(".")[0] for group in groups for name in group.carried}
        seconds = {"curves": sum(_ordering(outlook, group) + SAMPLES[1] * outlook.forward for group in groups)}
        forms = [family for family in beside if isinstance(family, Decomposition)]
        if groups and forms:
            seconds["plans"] = NARROWER * curve_seconds(replace(outlook, spent=lambda _, own: own), forms)
        return FamilyForecast(
            seconds,
            Cost(*(min(cost.amounts()[name] for cost in least) for name in RESOURCES)),
            frozenset(made | carried),
        )


@dataclass(frozen=True, eq=False)
class _Maker:
    """Maker of the plans of one method.

    Attributes:
        asked: The request.
        seed: Seed, recorded in the plans.
        remover: The channels.
        forms: Families that have ranks.
        ranks: Proposer of those; None where there are none.
    """

    asked: Asked
    seed: int
    remover: Remover
    forms: Sequence[Decomposition]
    ranks: RankProposer | None

    def curves(self, selector: RankSelector) -> Curves | None:
        """Curves of the original's ranks, as a selector reads them."""
        if self.ranks is None:
            return None
        return self.ranks.curves(selector.multiple, reads=selector.reads)

    def plan(self, way: ChannelWay) -> Plan:
        """The plan of a way."""
        return self.remover.plan(
            self.asked.budget,
            share=way.share,
            sizes=way.sizes,
            families=self.forms,
            selector=way.selector,
            seed=self.seed,
            repair=self.asked.repair,
            evaluate=self.asked.evaluate,
            world=world(),
            ranks=self.curves(way.selector) if "ranks" in way.sizes.reads else None,
        )

    def measured(self, way: ChannelWay, alone: ChannelWay) -> Plan:
        """The plan of a way whose errors of channels are scaled.

        The scale is what an error predicted for channels costs, over what one predicted for ranks does: each measured,
        after repair, on the plan that reaches the budget by them alone. These plans are tried anyway.

        Args:
            way: The way, by a `Ledger`.
            alone: The way that removes channels alone.
        """
        asked, curves = self.asked, self.curves(way.selector)
        if self.ranks is None or curves is None or asked.evaluate is None:
            raise TypeError("a scale is measured on plans that are carried out")
        by_channels, by_ranks = self.plan(alone), self.ranks.plan(asked, curves, way.selector)
        predicted = self.remover.errors(by_channels, curves)
        others = sum(decision.error or 0.0 for decision in by_ranks.decisions)
        scale = 1.0
        if min(predicted, others) > 0:
            lost, less = asked.evaluate(by_channels, None), asked.evaluate(by_ranks, None)
            if min(lost, less) > 0 and math.isfinite(lost + less):
                scale = (lost / predicted) / (less / others)
        return self.plan(replace(way, sizes=Ledger(scale=float(f"{scale:.{DIGITS}g}"))))


def _narrowest(outlook: Outlook, groups: Sequence[ChannelGroup], method: Interpolative) -> Cost:
    """The whole model with each group at as few units as the method leaves."""
    curves = [RemovalCurve(group, torch.arange(group.units), torch.zeros(group.units + 1)) for group in groups]
    stacks = stacks_of(groups, multiple_of=method.multiple_of, uniform=method.uniform)
    widths = Widths(outlook.model, curves, outlook.sites, {}, stacks)
    for number, stack in enumerate(stacks):
        widths.set(number, stack.allowed[0])
    return widths.cost


def _ordering(outlook: Outlook, group: ChannelGroup) -> float:
    """Seconds of trying a group three times, on the batch first, and of ordering its units by every reader."""
    total = outlook.forward * (3 * outlook.batch + 24)
    for path, units in group.read.items():
        site = outlook.sites.at(path)
        taps = site.geometry.features * max(1, len(units) // max(site.geometry.inputs, 1)) // len(units)
        outputs = site.geometry.canonical_shape[0]
        total += outlook.spent(site, outlook.rates.elimination(group.units, max(taps, 1), outputs))
    return total


def channel_ways(selector: RankSelector | None, sizes: WidthSelector | None, *, ranks: bool) -> list[ChannelWay]:
    """Ways to remove channels: all the way, half of it with ranks for the rest, and by the ledger, with predicted and
    with measured errors; without ranks, by all selectors.

    Args:
        selector: Selector of ranks that the caller gave; None is each of the defaults.
        sizes: Selector of channels that the caller gave; None is each of the defaults.
        ranks: True if there are families with ranks.
    """
    ranks_by = Lagrangian() if selector is None else selector
    if not ranks:
        tried = SIZES if sizes is None else {name_of(sizes): sizes}
        return [ChannelWay(f"channels, {name}", 1.0, each, ranks_by, True) for name, each in tried.items()]
    half = SIZES[HALF_WAY]
    by, joint = name_of(ranks_by), Ledger()
    return [
        ChannelWay("channels", 1.0, half, ranks_by, True),
        ChannelWay(f"channels + {by}", 0.5, half, ranks_by, True),
        ChannelWay(f"ledger + {by}", 1.0, joint, ranks_by, False),
        ChannelWay(f"measured ledger + {by}", 1.0, joint, ranks_by, True, measured=True),
    ]

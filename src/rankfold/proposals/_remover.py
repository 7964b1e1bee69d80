"""Channel groups + budget → a plan that removes channels, and cuts what is left by the other families."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from rankfold.allocation import Budget, Curves, RankSelector
from rankfold.allocation.measuring import measure, spectra_of
from rankfold.channels.elimination import RemovalCurve, even, removal_curves
from rankfold.channels.groups import ChannelGroup, find_channels
from rankfold.channels.narrowing import Attributes, Cuts, attributes_of, cuts_of, fold_and_cut_, narrowed_sites
from rankfold.channels.stacks import Stack, Widths, stacks_of
from rankfold.channels.stock import is_stock, stock_units
from rankfold.channels.trial import removable
from rankfold.channels.widths import WidthSelector
from rankfold.comparison.objectives import Objective
from rankfold.cost.counted import count
from rankfold.data.batches import Batch
from rankfold.decompositions import Decomposition, Interpolative
from rankfold.distributed import ALONE, World
from rankfold.errors import SiteError
from rankfold.plan import ChannelDecision, Plan
from rankfold.plan.making import dense_plan, make_plan
from rankfold.plan.repair import Lockstep
from rankfold.registry import name_of, to_json
from rankfold.sites.copies import copied
from rankfold.sites.finding import fingerprint
from rankfold.sites.site import Sites, Skip
from rankfold.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Remover:
    """Data that all plans that remove channels of one model share.

    Attributes:
        model: The original.
        example: One batch.
        sites: Sites of the model.
        stats: Statistics of the model.
        method: Method with the rule of removal.
        curves: Removal curves, one per group.
        stacks: Groups that keep equally many units, with the numbers that they may keep.
        norms: Name of the running mean of the batch norm that can absorb a layer's bias, by path.
        skips: Layers whose channels must stay, with the reason, by path.
        factors: Measured factors on the errors of ranks, by path of the site.
    """

    model: nn.Module
    example: Batch
    sites: Sites
    stats: Statistics
    method: Interpolative
    curves: tuple[RemovalCurve, ...]
    stacks: tuple[Stack, ...]
    norms: Mapping[str, str | None]
    skips: Mapping[str, str]
    factors: Mapping[str, float] = field(default_factory=dict)
    narrowed: dict[tuple[object, ...], Curves] = field(default_factory=dict)  # rank curves by what was removed

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Batch,
        sites: Sites,
        stats: Statistics,
        method: Interpolative,
        *,
        selectors: Collection[WidthSelector] = (),
        seed: int = 0,
    ) -> Remover:
        """Find the groups and measure the errors of removing their units.

        Each group is tried first: without a fold, a copy of the model without some units must compute what the original
        computes when no layer reads them. A group of which that is not true is skipped with the reason.

        Args:
            model: The original.
            example: One batch.
            sites: Sites of the model.
            stats: Statistics of the model.
            method: Method with the rule of removal.
            selectors: Selectors of widths that plans will use; the curves hold the data that these read.
            seed: Seed of the rule "random".

        Raises:
            SiteError: There is no group whose channels can be removed.
        """
        channels = find_channels(model, sites)
        groups: list[ChannelGroup] = [group for group in channels if even(group)]
        skips = {skip.path: skip.reason for skip in channels.skips}
        skips |= {group.name: "frozen: its units are read unevenly" for group in channels if group not in groups}
        any_batch = sites.graph.static_batch is None
        groups, refused = removable(model, groups, example, any_batch=any_batch)
        skips |= refused
        if not groups or sites.graph.program is None:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(skips.items())[:3])
            raise SiteError(
                str(method),
                law="there are channels that can be removed",
                got=f"none ({reasons})" if reasons else "none",
                cure="use low-rank families",
            )
        stock = method.uniform and is_stock(model)
        stacks = stacks_of(
            groups,
            multiple_of=method.multiple_of,
            uniform=method.uniform,
            allowed=partial(stock_units, model) if stock else None,
        )
        if stock:
            skips |= {
                groups[i].name: "frozen: no configuration of its class says fewer"
                for stack in stacks
                for i in stack.members
                if len(stack.allowed) == 1
            }
        norms = {call.path: call.norm for call in sites.in_graph()}
        curves = removal_curves(
            model,
            groups,
            stats,
            sites=sites,
            method=method,
            norms=norms,
            remainders=any("remainders" in each.reads for each in selectors),
            relative=any("relative" in each.reads for each in selectors),
            seed=seed,
        )
        return cls(model, example, sites, stats, method, tuple(curves), stacks, norms, skips)

    def plan(
        self,
        budget: Budget,
        *,
        share: float,
        sizes: WidthSelector,
        families: Sequence[Decomposition],
        selector: RankSelector,
        seed: int,
        repair: Lockstep | None,
        evaluate: Callable[[Plan, Objective | None], float] | None = None,
        world: World = ALONE,
        ranks: Curves | None = None,
    ) -> Plan:
        """A plan in which removing channels covers a share of the way to the budget, and the other families the rest.

        Args:
            budget: Upper bounds on the whole model.
            share: Share of the way, in (0, 1]; at 1 every layer stays dense on the channels that it has left.
            sizes: Selector of how many units of each group stay.
            families: Families for the rest of the way; read where `share` is below 1, or `ranks` are given.
            selector: Selector of their ranks.
            seed: Seed, recorded in the plan.
            repair: The repair, recorded in the plan; None for none.
            evaluate: Function that carries a plan out and returns its divergence, as for `make_plan`.
            world: Processes that divide the curves among themselves.
            ranks: Curves of the original's ranks, for selectors of sizes that read "ranks": these weigh channels
                against ranks themselves.

        Raises:
            BudgetError: The budget cannot be met on this way.
        """
        bounds = budget.bounds(self.sites.cost)
        chosen = sizes.select(self.widths(budget, share=share, ranks=ranks))
        decided = self._decided(chosen, f"width by {name_of(sizes)}; the others are predicted linearly from these")
        masks = {decision.group: _mask(decision) for decision in decided}
        groups = [curve.group for curve in self.curves]
        cuts, attributes = cuts_of(self.model, groups, masks), attributes_of(groups, masks)
        frozen = tuple(Skip(path, f"channels {reason}") for path, reason in self.skips.items())

        def complete(plan: Plan) -> Plan:
            return replace(
                plan,
                fingerprint=self.sites.fingerprint,
                budget=budget.to_json(),
                skips=(*plan.skips, *frozen),
                channels=tuple(decided),
                cuts=cuts,
                attributes=attributes,
                removal=to_json(self.method) if decided else None,
                width_selector=to_json(sizes) if decided else None,
            )

        if (share < 1 or ranks is not None) and families:
            spectra = "spectra" in selector.reads
            key = (*decided, *families, spectra)
            if key not in self.narrowed:
                self.narrowed[key] = self._curves(cuts, attributes, families, world, spectra=spectra)
            plan = make_plan(
                self.narrowed[key],
                budget=Budget(**bounds),
                selector=selector,
                seed=seed,
                calibration=self.stats.manifest,
                repair=repair,
                evaluate=None if evaluate is None else lambda plan, what: evaluate(complete(plan), what),
            )
        else:
            plan = self._dense(seed, repair)
        return complete(plan)

    def alone(self, left: Mapping[str, int], *, seed: int) -> Plan:
        """The plan that removes the units of some groups and does nothing else, without repair.

        Args:
            left: Units that stay, by name of the group.
            seed: Seed, recorded in the plan.
        """
        decided = self._decided(left, "one cut")
        masks = {decision.group: _mask(decision) for decision in decided}
        groups = [curve.group for curve in self.curves]
        return replace(
            self._dense(seed, None),
            channels=tuple(decided),
            cuts=cuts_of(self.model, groups, masks),
            attributes=attributes_of(groups, masks),
            removal=to_json(self.method),
        )

    def scaled(self, groups: Mapping[str, float], sites: Mapping[str, float]) -> Remover:
        """The same with measured scales of the errors.

        Args:
            groups: Factors on the errors of channels, by name of the group.
            sites: Factors on the errors of ranks, by path of the site.
        """
        curves = tuple(each.scaled(groups.get(each.group.name, 1.0)) for each in self.curves)
        return replace(self, curves=curves, factors=sites, narrowed={})

    def _decided(self, left: Mapping[str, int], why: str) -> list[ChannelDecision]:
        return [
            ChannelDecision(each.group.name, each.group.units, each.kept(units, self.method), why, self.method.fold)
            for each in self.curves
            if (units := left.get(each.group.name, each.group.units)) < each.group.units
        ]

    def _dense(self, seed: int, repair: Lockstep | None) -> Plan:
        """The plan that leaves every layer dense."""
        why, read = "on the channels it has left", self.stats.manifest
        return dense_plan(self.sites, why=why, seed=seed, calibration=read, repair=repair)

    def widths(self, budget: Budget, *, share: float = 1.0, ranks: Curves | None = None) -> Widths:
        """The model with all its channels, and bounds that a share of the way to a budget asks for."""
        whole, bounds = self.sites.cost.amounts(), budget.bounds(self.sites.cost)
        part = {name: whole[name] - int((whole[name] - bound) * share) for name, bound in bounds.items()}
        return Widths(self.model, self.curves, self.sites, part, self.stacks, ranks)

    def errors(self, plan: Plan, ranks: Curves) -> float:
        """The error that is predicted for the channels that a plan removes, in the unit of the errors of ranks."""
        gone = {decision.group: decision.units - len(decision.kept) for decision in plan.channels}
        lost = (float(each.errors[gone[each.group.name]]) for each in self.curves if each.group.name in gone)
        return sum(lost) / ranks.unit

    def _curves(
        self,
        cuts: Cuts,
        attributes: Attributes,
        families: Sequence[Decomposition],
        world: World,
        *,
        spectra: bool,
    ) -> Curves:
        """Rank curves of the model as some cuts leave it, with spectra where a selector reads them."""
        narrow = copied(self.model)
        norms = self.norms if self.method.fold else None
        stats = fold_and_cut_(narrow, self.model, self.sites, cuts, self.stats, norms, attributes)
        left = narrowed_sites(self.model, self.sites, cuts)
        sites = self.sites.smaller(left, cost=count(narrow, self.example), fingerprint=fingerprint(narrow))
        curves = measure(narrow, stats, sites=sites, families=families, world=world)
        curves = curves.scaled(self.factors)
        if not spectra:
            return curves
        return replace(curves, spectra=spectra_of(narrow, stats, sites=sites, families=families))


def _mask(decision: ChannelDecision) -> torch.Tensor:
    mask = torch.zeros(decision.units, dtype=torch.bool)
    mask[list(decision.kept)] = True
    return mask

"""Plans that remove residual branches: alone, and in exchange for what the other families would have to cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from torch.export import ExportedProgram

from rankfold.allocation import Budget
from rankfold.branches.finding import BranchError, find_branches, first_names, layers_in
from rankfold.channels.ledger import Ledger
from rankfold.channels.stacks import Widths
from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import Cost
from rankfold.decompositions import Branches, Family
from rankfold.errors import BudgetError, SiteError
from rankfold.plan import Plan
from rankfold.proposals._base import (
    Asked,
    Basis,
    FamilyForecast,
    Outlook,
    Proposal,
    Proposer,
    proposes,
)
from rankfold.proposals._channels import ChannelProposer
from rankfold.proposals._ranks import RankProposer
from rankfold.proposals._reducer import Reduced, Reducer
from rankfold.sites.reach import unreachable
from rankfold.store.work import Work

WEIGHED = "ledger with branches"
EXCHANGED = "branches, exchanged"


@proposes(Branches)
class BranchProposer(Proposer):
    """Proposer of plans that remove branches: until the budget holds, or as long as outputs come closer."""

    def __init__(self, basis: Basis, families: Sequence[Family]) -> None:
        super().__init__(basis, families)
        self._found: list[Reducer | None] = []

    @property
    def others(self) -> tuple[Family, ...]:
        """The families of other kinds."""
        return tuple(family for family in self.basis.families if family not in self.families)

    def proposals(self, asked: Asked) -> list[Proposal]:
        """One proposal for each family of its kind."""
        reducer = self.branches(alone=not self.others)
        if reducer is None:
            return []
        if asked.repair is None or asked.evaluate is None:
            if self.others:
                self.basis.notes.append("no branches were removed: that needs a repair")
                return []
            raise SiteError(
                "families", law="branches are removed with a repair", got="repair=None", cure="leave it out"
            )
        found = []
        for family in self.families:
            if isinstance(family, Branches) and self.others:
                found.append(Proposal(WEIGHED, partial(self._weighed, reducer, asked), always=False))
                found.append(Proposal(EXCHANGED, partial(self._exchanged, reducer, family, asked), always=False))
            elif isinstance(family, Branches):
                found.append(Proposal("branches", partial(self._alone, reducer, family, asked)))
        return found

    def _alone(self, reducer: Reducer, family: Branches, asked: Asked) -> Plan:
        """Remove branches until the budget holds, all else dense.

        Raises:
            BudgetError: It does not hold without any branch.
        """
        bounds = asked.budget.bounds(self.basis.sites.cost)
        reduced = reducer.without(())
        for now in chain([reduced], self.removal(reducer, family, asked)):
            reduced = now
            if all(now.cost.amounts()[name] <= bound for name, bound in bounds.items()):
                return self._dense(reducer, now, asked)
        raise self._unreachable(reduced, bounds)

    def removal(self, reducer: Reducer, family: Branches, asked: Asked) -> Iterator[Reduced]:
        """Remove the branch that costs least for what it saves, after repair, one after the other.

        Args:
            reducer: The branches.
            family: The family, which says how many are tried at each step.
            asked: The request: resources of the budget that are over their bound count as saved, or all of them where
                none is.

        Yields:
            The model without one branch, two, and so on.
        """
        evaluate = _given(asked)
        bounds = asked.budget.bounds(self.basis.sites.cost)
        now, error = reducer.without(()), 0.0
        while True:
            broken = [name for name, bound in bounds.items() if now.cost.amounts()[name] > bound] or list(bounds)
            steps = self._steps(reducer, now, broken, family.tried)
            if not steps:
                return
            after = {step.gone: evaluate(self._dense(reducer, step, asked)) for step in steps if len(steps) > 1}
            best = min(steps, key=lambda step: (after.get(step.gone, 0.0) - error) / self._saved(now, step, broken))
            now, error = best, after.get(best.gone, error)
            yield now

    def _dense(self, reducer: Reducer, reduced: Reduced, asked: Asked) -> Plan:
        dense = reducer.dense(reduced, seed=self.basis.seed, repair=asked.repair)
        return replace(dense, budget=asked.budget.to_json())

    def _exchanged(self, reducer: Reducer, family: Branches, asked: Asked) -> Plan:
        """Remove branches one at a time while the best plan of the other families for the rest comes closer.

        Raises:
            BudgetError: No plan can be made.
        """
        evaluate = _given(asked)
        resources = list(asked.budget.bounds(self.basis.sites.cost))
        least, way, proposer, plan = self._best(asked)
        now = reducer.without(())
        while True:
            found: list[tuple[float, Reduced, Plan]] = []
            for step in self._steps(reducer, now, resources, family.tried):
                made = self._by(way, proposer, reducer, step, asked)
                if made is not None:
                    found.append((evaluate(made), step, made))
            best = min(found, key=lambda each: each[0], default=None)
            if best is None or best[0] >= least:
                return plan
            least, now, plan = best

    def _best(self, asked: Asked) -> tuple[float, str, Proposer, Plan]:
        """The best plan of the other families for the whole model: its error, its name, and who makes it.

        Raises:
            BudgetError: No plan can be made.
        """
        ways: list[tuple[float, str, Proposer, Plan]] = []
        failures: list[BudgetError] = []
        for proposer in self.beside:
            for proposal in proposer.proposals(asked):
                try:
                    plan = proposal.make()
                except BudgetError as cause:
                    failures.append(cause)
                    continue
                ways.append((_given(asked)(plan), proposal.name, proposer, plan))
        if not ways:
            raise failures[0]
        return min(ways, key=lambda each: each[0])

    def _weighed(self, reducer: Reducer, asked: Asked) -> Plan:
        """Remove the branches that a ledger weighs against channels and ranks; the others cut what is left to cut.

        Raises:
            BudgetError: No plan can be made.
        """
        reduced = self.weighed(reducer, asked)
        try:
            _, name, proposer, plan = self._best(asked)
        except BudgetError:  # not without branches: each way is tried on what these leave
            ways = [(each.name, by) for by in self.beside for each in by.proposals(asked)]
        else:
            if not reduced.gone:
                return plan
            ways = [(name, proposer)]
        plans = [self._by(way, by, reducer, reduced, asked) for way, by in ways]
        made = [each for each in plans if each is not None]
        if not made:
            raise self._unreachable(reduced, asked.budget.bounds(self.basis.sites.cost))
        return made[0] if len(made) == 1 else min(made, key=_given(asked))

    def weighed(self, reducer: Reducer, asked: Asked) -> Reduced:
        """The model without the branches that a `Ledger` lets go, at the price at which the budget holds.

        Args:
            reducer: The branches.
            asked: The request.

        Raises:
            BudgetError: The budget does not hold at any price.
        """
        channels = next((each for each in self.beside if isinstance(each, ChannelProposer)), None)
        ranks = next((each for each in self.beside if isinstance(each, RankProposer)), None)
        curves = None if ranks is None else ranks.curves()
        widths = None if channels is None else channels.widths(asked, curves)
        if widths is None:
            basis = self.basis
            widths = Widths(basis.model, (), basis.sites, asked.budget.bounds(basis.sites.cost), (), curves)
        reduced = reducer.without(())
        for name in Ledger().without(widths, [reducer.move(name) for name in reducer.branches]):
            try:
                reduced = reducer.without((*reduced.gone, name))
            except BranchError:  # it cannot go together with those before it
                continue
        return reduced

    def _by(self, way: str, proposer: Proposer, reducer: Reducer, reduced: Reduced, asked: Asked) -> Plan | None:
        """A plan of other families for a model without some branches.

        Args:
            way: Name of the proposal.
            proposer: The proposer that makes it, for the whole model.
            reducer: The branches.
            reduced: The model.
            asked: The request.

        Returns:
            The plan, of the original; None where it cannot be made under the budget.
        """
        basis = self.basis
        model = reducer.model_of(reduced)
        sites = reducer.sites_of(reduced, model, traced=proposer.traces)
        own = replace(
            basis,
            model=model,
            sites=sites,
            stats=reducer.stats_of(reduced, model),
            families=self.others,
            notes=[],
            cuts=None,  # these are of the original, whose scales are taken over
        )
        bounds = Budget(**asked.budget.bounds(basis.sites.cost))

        def complete(plan: Plan) -> Plan:
            return replace(reducer.complete(plan, reduced), budget=asked.budget.to_json())

        evaluate = _given(asked)
        inner = replace(asked, budget=bounds, evaluate=lambda plan, _: evaluate(complete(plan)))
        proposals = proposer.on(replace(own, work=Work())).proposals(inner)
        proposal = next((each for each in proposals if each.name == way), None)
        try:
            plan = None if proposal is None else proposal.make()
        except BudgetError:
            return None
        return None if plan is None else complete(plan)

    def _steps(self, reducer: Reducer, now: Reduced, resources: Sequence[str], most: int) -> list[Reduced]:
        """Models without one branch more: those that seem cheapest for what they save."""
        whole = reducer.without(())

        def price(name: str) -> float:
            saved = self._saved(whole, reducer.alone[name], resources)
            return reducer.losses[name] / saved if saved > 0 else math.inf

        found: list[Reduced] = []
        for name in sorted((each for each in reducer.branches if now.keeps(each)), key=price):
            if len(found) == most:
                break
            try:
                step = reducer.without((*now.gone, name))
            except BranchError:
                continue
            if self._saved(now, step, resources) > 0:
                found.append(step)
        return found

    def _unreachable(self, now: Reduced, bounds: Mapping[str, int]) -> BudgetError:
        """The error for a budget that is broken where no branch is left to go."""
        reached = now.cost.amounts()
        return unreachable(
            self.basis.sites.whole,
            bounds,
            {name: reached[name] for name in bounds},
            sites=self.basis.sites,
            frozen={},
            reduced={site.path for site in self.basis.sites if not now.keeps(site.path)},
            cure="allow families that make layers smaller",
        )

    def _saved(self, now: Reduced, step: Reduced, resources: Sequence[str]) -> float:
        """Share of the original that a step saves, over the resources that are asked for."""
        before, after, whole = (cost.amounts() for cost in (now.cost, step.cost, self.basis.sites.whole))
        return sum((before[name] - after[name]) / max(whole[name], 1) for name in resources)

    def branches(self, *, alone: bool) -> Reducer | None:
        """The branches; None where none can go, and there are other families.

        Raises:
            SiteError: None can go, and there is nothing else.
        """
        if not self._found:
            basis = self.basis
            try:
                self._found.append(
                    basis.clock.time("curves", lambda: Reducer.of(basis.model, basis.example, basis.sites, basis.stats))
                )
            except SiteError as cause:
                if alone:
                    raise
                basis.notes.append(f"no branches were removed: {cause.got}")
                self._found.append(None)
        return self._found[0]

    @classmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool) -> tuple[int, int]:
        """See `Proposer.numbers`."""
        return 2 * len(families) if ranks else len(families), 0 if ranks else len(families)

    @classmethod
    def forecast(cls, outlook: Outlook, families: Sequence[Family], beside: Sequence[Family]) -> FamilyForecast:
        """See `Proposer.forecast`: the least is the model without any of its branches, as if all could go."""
        sites = outlook.sites
        if sites.graph.program is None:
            return FamilyForecast({}, sites.cost, frozenset())
        inside = frozenset(set().union(*_inside(sites.graph.program, first_names(outlook.model))))
        least = sites.cost - sum((dense_cost(site) for site in sites if site.path in inside), Cost())
        return FamilyForecast({}, least, inside)


def _inside(program: ExportedProgram, names: Mapping[str, str]) -> list[set[str]]:
    return list(layers_in(program, find_branches(program, names), names).values())


def _given(asked: Asked) -> Callable[[Plan], float]:
    """The divergence of a plan after repair."""
    evaluate = asked.evaluate
    if evaluate is None:
        raise TypeError("plans that remove branches are chosen by carrying them out")
    return lambda plan: evaluate(plan, None)

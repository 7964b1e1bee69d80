"""Branches that go → the model without them, and plans of it as plans of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from rankfold.branches.finding import Branch, BranchError, find_branches, first_names, layers_in
from rankfold.branches.installing import below, install_stands_
from rankfold.branches.price import loss_of
from rankfold.branches.trial import stands_of
from rankfold.channels.ledger import BranchMove
from rankfold.cost.counted import count
from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import Cost
from rankfold.data.batches import Batch
from rankfold.errors import SiteError
from rankfold.graph.trace import trace
from rankfold.layers.stands import Stand
from rankfold.plan import BranchDecision, Decision, Plan
from rankfold.plan.making import dense_plan
from rankfold.plan.repair import Lockstep
from rankfold.sites.copies import copied
from rankfold.sites.finding import fingerprint
from rankfold.sites.site import Sites, Skip
from rankfold.statistics import Statistics
from rankfold.statistics._coherence import coherences

WHY = "its loss cost least for what it saves"
NOT_SELECTED = "not selected"  # kind of the skips that the caller asked for


@dataclass(frozen=True, eq=False)
class Reduced:
    """A model without some branches.

    Attributes:
        gone: Names of the branches.
        stands: What takes the place of modules, with the branch that ends there, by path.
        cost: Cost of the model.
    """

    gone: tuple[str, ...]
    stands: Mapping[str, tuple[str, Stand]]
    cost: Cost

    def keeps(self, path: str) -> bool:
        """Whether a module of the original is in it."""
        return not below(path, self.stands)


@dataclass(frozen=True, eq=False)
class Reducer:
    """Data that all plans that remove branches of one model share.

    Attributes:
        model: The original.
        example: One batch.
        sites: Sites of the model.
        stats: Statistics of the model.
        branches: Branches that can go, each alone, by name.
        alone: The model without each of them alone, by name.
        losses: Predicted error of the loss of each, by name.
        skips: Branches that cannot, with the reason, by name.
    """

    model: nn.Module
    example: Batch
    sites: Sites
    stats: Statistics
    branches: Mapping[str, Branch]
    alone: Mapping[str, Reduced]
    losses: Mapping[str, float]
    skips: Mapping[str, str]
    _reduced: dict[frozenset[str], Reduced] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: Batch, sites: Sites, stats: Statistics) -> Reducer:
        """Find the branches, and try each of them.

        Raises:
            SiteError: No branch can go.
        """
        program = sites.graph.program
        names = first_names(model)
        found = [] if program is None else find_branches(program, names)
        left = {skip.path for skip in sites.skips if skip.kind == NOT_SELECTED}
        inside = {} if program is None else layers_in(program, found, names)
        branches: dict[str, Branch] = {}
        alone: dict[str, Reduced] = {}
        skips: dict[str, str] = {}
        for branch in found:
            if kept := sorted(inside[branch.name] & left):
                skips[branch.name] = f"{NOT_SELECTED}: {kept[0]} is in the branch"
                continue
            try:
                alone[branch.name] = _reduced(model, sites, [branch], example)
            except BranchError as cause:
                skips[branch.name] = f"frozen: the model fails without the branch ({cause})"
                continue
            branches[branch.name] = branch
        if not branches:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skips.items())[:3])
            raise SiteError(
                "families",
                law="there are residual branches that can go",
                got=f"none ({reasons})" if reasons else "none",
                cure="use other families",
            )
        told, known = coherences(stats.sites), {site.path: site for site in sites}
        losses = {
            name: loss_of(known[name], model.get_submodule(name), stats, told.get(name)) if name in known else math.inf
            for name in branches
        }
        return cls(model, example, sites, stats, branches, alone, losses, skips)

    def without(self, gone: Sequence[str]) -> Reduced:
        """The model without some branches.

        Raises:
            BranchError: They cannot go together.
        """
        key = frozenset(gone)
        if key not in self._reduced:
            own = [branch for name, branch in self.branches.items() if name in key]
            self._reduced[key] = _reduced(self.model, self.sites, own, self.example)
        return self._reduced[key]

    def move(self, name: str) -> BranchMove:
        """A branch as a `Ledger` weighs it."""
        alone = self.alone[name]
        gone = [site for site in self.sites if not alone.keeps(site.path)]
        beside = self.sites.cost - alone.cost - sum((dense_cost(site) for site in gone), Cost())
        return BranchMove(name, frozenset(site.path for site in gone), self.losses[name], beside)

    def model_of(self, reduced: Reduced) -> nn.Module:
        """A copy of the original without some branches; its constants are zero."""
        return _small(self.model, reduced.stands)

    def sites_of(self, reduced: Reduced, model: nn.Module, *, traced: bool = True) -> Sites:
        """The sites that are left in the model without some branches, on a trace of it, or of the original."""
        left = [site for site in self.sites if reduced.keeps(site.path)]
        return replace(
            self.sites.smaller(left, cost=reduced.cost, fingerprint=fingerprint(model)),
            skips=tuple(skip for skip in self.sites.skips if reduced.keeps(skip.path)),
            graph=trace(model, self.example) if traced else self.sites.graph,
        )

    def stats_of(self, reduced: Reduced, model: nn.Module) -> Statistics:
        """The statistics of the original at the sites that are left."""
        own = {path: each for path, each in self.stats.sites.items() if reduced.keeps(path)}
        return Statistics(own, dict(self.stats.manifest), fingerprint(model))

    def dense(self, reduced: Reduced, *, seed: int, repair: Lockstep | None) -> Plan:
        """The plan that removes some branches, and leaves all else dense."""
        why, read = "no family cuts its ranks", self.stats.manifest
        plan = dense_plan(self.sites, why=why, seed=seed, calibration=read, repair=repair)
        plan = replace(plan, decisions=tuple(each for each in plan.decisions if reduced.keeps(each.site)))
        return self.complete(plan, reduced)

    def complete(self, plan: Plan, reduced: Reduced) -> Plan:
        """A plan of the smaller model as a plan of the original."""
        decided = {decision.site: decision for decision in plan.decisions}
        ends = {name: path for path, (name, _) in reduced.stands.items() if name}
        frozen = tuple(Skip(name, f"branch {reason}") for name, reason in self.skips.items())
        gone = tuple(skip for skip in self.sites.skips if not reduced.keeps(skip.path))
        return replace(
            plan,
            decisions=tuple(
                decided.get(site.path) or Decision(site.path, None, 0, "gone with its branch") for site in self.sites
            ),
            skips=(*plan.skips, *(skip for skip in gone if skip not in plan.skips), *frozen),
            fingerprint=self.sites.fingerprint,
            branches=tuple(BranchDecision(name, ends.get(name, ""), WHY) for name in reduced.gone),
            stands={path: stand for path, (_, stand) in reduced.stands.items()},
        )


def _reduced(model: nn.Module, sites: Sites, gone: Sequence[Branch], example: Batch) -> Reduced:
    """A model without some branches, tried.

    Raises:
        BranchError: They cannot go.
    """
    if not gone:
        return Reduced((), {}, sites.cost)
    stands = stands_of(model, sites.graph, gone, example)
    return Reduced(tuple(branch.name for branch in gone), stands, count(_small(model, stands), example))


def _small(model: nn.Module, stands: Mapping[str, tuple[str, Stand]]) -> nn.Module:
    return install_stands_(copied(model), {path: stand for path, (_, stand) in stands.items()})

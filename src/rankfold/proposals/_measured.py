"""One cut at a time, carried out on a few samples: what a predicted error of a site, or of channels, really costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankfold.allocation import Curves
from rankfold.channels.elimination import RemovalCurve
from rankfold.channels.stacks import Stack
from rankfold.decompositions import Decomposition
from rankfold.distributed import world
from rankfold.errors import BudgetError, NumericsError, PlanError, SelfCheckError
from rankfold.factors import Rank
from rankfold.plan import Decision, Plan
from rankfold.plan.making import dense_plan
from rankfold.progress import Progress
from rankfold.sites.site import Site, Sites

TARGET = 0.01  # predicted error of a cut that is carried out, where losing every output costs 1 a site on average
SAMPLES = (16, 32)  # least and largest number of samples that a cut is carried out on
FEWEST = 8  # with fewer samples errors stay as predicted
SHARE = 16  # of so many samples one is among them
WRONG = (SelfCheckError, PlanError, NumericsError, BudgetError)  # errors by which a plan drops out, in every run
DIGITS = 3  # of a ratio: more are not the same on every machine
FURTHEST = 16.0  # factor by which a measured error may differ from the predicted one, against the others


@dataclass(frozen=True, eq=False)
class Cuts:
    """Cuts that are carried out one at a time.

    Attributes:
        carry_out: Function that carries a plan out, without repair, and returns the divergence of the outputs on a few
            samples.
        calibration: Manifest of the data, recorded in the plans.
        seed: Seed, recorded in the plans.
        progress: Callback for every cut.
        notes: Remarks for the report.
    """

    carry_out: Callable[[Plan], float]
    calibration: Mapping[str, Any]
    seed: int
    progress: Progress
    notes: list[str]

    def ratios(self, plans: Mapping[str, tuple[Plan, float]]) -> dict[str, float]:
        """What each plan costs over what it is predicted to cost, by name.

        One that costs nothing, has no finite outputs or cannot be carried out has no ratio; the last is noted.

        Args:
            plans: Plans with one cut each, and the error predicted for it, by name.
        """
        found: dict[str, float] = {}
        failed: list[str] = []
        with self.progress("cuts", len(plans)) as advance:
            for name, (plan, predicted) in plans.items():
                try:
                    ratio = self.carry_out(plan) / predicted if predicted > 0 else 0.0
                except WRONG as cause:
                    if world().size > 1:  # the others would wait for this process
                        raise
                    failed.append(f"{name} ({cause})")
                else:
                    if ratio > 0 and math.isfinite(ratio):
                        found[name] = float(f"{ratio:.{DIGITS}g}")
                advance()
        if failed:
            self.notes.append(f"errors that were predicted and not measured: {'; '.join(failed[:5])}")
        return found


def measured_sites(curves: Curves, cuts: Cuts, predicted: Callable[[Site, Decomposition, Rank], float]) -> Curves:
    """Curves whose shape is predicted, and whose scale is measured.

    A curve's shape comes from its spectrum. Its scale, an estimate by gradients, holds for small errors that the rest
    of the network passes on alike; what one cut really does to the outputs replaces it. Each site is cut alone, to the
    option whose predicted error is nearest to 0.01, and the errors of all its options are multiplied by what that was
    measured to cost over what was predicted for these samples, relative to the median over the sites. (On the samples
    that factors are made of they lose less than on others; a curve tells the latter, and its prediction for the former
    is what the measurement is compared with.)

    Args:
        curves: Predicted curves.
        cuts: The cuts.
        predicted: Function from a site, a method and a rank to the error predicted for the samples at hand.

    References:
        LEMS, ICML 2026, for one cut a layer. We differ in the metric of the outputs, in the point of the cut, and in
        that no depth factor is fitted.
    """
    plans: dict[str, tuple[Plan, float]] = {}
    for site in curves.sites:
        options = [
            (error, curve.method, rank)
            for curve in curves.of(site)
            for rank, error in zip(curve.ranks, curve.errors, strict=True)
            if error > 0
        ]
        if options:
            _, method, rank = min(options, key=lambda each: abs(math.log(each[0] / TARGET)))
            decision = Decision(site.path, method, rank, "one cut")
            plans[site.path] = _alone(curves.sites, decision, cuts), predicted(site, method, rank) / curves.unit
    ratios = cuts.ratios(plans)
    if not ratios:
        return curves
    usual = statistics.median(ratios.values())
    return curves.scaled({path: _within(ratio / usual) for path, ratio in ratios.items()}, usual)


def measured_stacks(
    curves: Sequence[RemovalCurve],
    stacks: Sequence[Stack],
    plan: Callable[[Mapping[str, int]], Plan],
    cuts: Cuts,
    ranks: Curves | None,
) -> dict[str, float]:
    """Factors on the errors of channels, by group: groups that go together are cut together, as in `measured_sites`.

    Args:
        curves: Removal curves, one for each group.
        stacks: Groups that keep equally many units.
        plan: Function from the numbers of units left of some groups to the plan that removes the others alone.
        cuts: The cuts.
        ranks: Measured curves of ranks, with which the factors share one scale; None is the median of the stacks.
    """
    unit = _energy(curves) if ranks is None else ranks.unit
    plans: dict[str, tuple[Plan, float]] = {}
    for stack in stacks:
        own = [curves[i] for i in stack.members]
        predicted = {
            left: sum(float(c.errors[c.group.units - left]) for c in own) / unit for left in stack.allowed[:-1]
        }
        if usable := {left: error for left, error in predicted.items() if error > 0 and math.isfinite(error)}:
            left = min(usable, key=lambda each: abs(math.log(usable[each] / TARGET)))
            plans[own[0].group.name] = plan({curve.group.name: left for curve in own}), usable[left]
    ratios = cuts.ratios(plans)
    if not ratios:
        return {}
    usual = statistics.median(ratios.values()) if ranks is None or ranks.cost is None else ranks.cost
    return {
        curves[i].group.name: _within(ratios[curves[stack.members[0]].group.name] / usual)
        for stack in stacks
        for i in stack.members
        if curves[stack.members[0]].group.name in ratios
    }


def _alone(sites: Sites, decision: Decision, cuts: Cuts) -> Plan:
    """The plan of one decision, with all other layers dense."""
    plan = dense_plan(sites, why="one cut", seed=cuts.seed, calibration=cuts.calibration)
    decisions = (decision if each.site == decision.site else each for each in plan.decisions)
    return replace(plan, decisions=tuple(decisions))


def _energy(curves: Sequence[RemovalCurve]) -> float:
    """Mean error of losing all but the last units of a group; 1 where that is zero."""
    return sum(float(curve.errors[-1]) for curve in curves) / max(len(curves), 1) or 1.0


def _within(factor: float) -> float:
    return float(f"{min(max(factor, 1 / FURTHEST), FURTHEST):.{DIGITS}g}")

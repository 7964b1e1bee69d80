"""The whole road in one call: a trained network and a budget in, a smaller network out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from rankfold.curves import DEFAULT_FAMILIES, check_families, measure, needed
from rankfold.decompositions import Decomposition
from rankfold.errors import BudgetError, OptionError
from rankfold.graph.sites import check_model, find_sites
from rankfold.metrics.compare import Comparison, compare
from rankfold.metrics.counted import count
from rankfold.metrics.latency import latency_ratio
from rankfold.plan import Plan
from rankfold.planning import make_plan
from rankfold.progress import Progress, silent
from rankfold.ranks import Budget, Lagrangian, RankSelector, Uniform
from rankfold.report.data import Candidate, Report, environment, rows
from rankfold.statistics.collect import collect
from rankfold.statistics.data import Split, as_batches
from rankfold.surgery import check_plan, copied, filler, install_shells

HELD_OUT = 10  # one calibration sample in this many is never fitted on
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: The compressed model, a plain `nn.Module`.
        plan: What was decided.
        report: What was done, before and after.
    """

    model: nn.Module
    plan: Plan
    report: Report


def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget,
    families: Sequence[Decomposition] = DEFAULT_FAMILIES,
    selector: RankSelector | None = None,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    positions: int | None = 64,
    seed: int = 0,
    progress: Progress = silent,
) -> Compressed:
    """Compress a trained network under one budget, without training it.

    One in ten calibration samples is held out and never fitted on. With `selector=None` two plans are made, one by
    `Lagrangian()` and one by `Uniform()`, both are carried out, and the one whose outputs on the held-out samples are
    closer to the original's is returned.

    Args:
        model: The trained network; left untouched, its training mode too.
        data: Calibration inputs, a re-iterable of batches (tensor, tuple whose first item is the input, or dict of
            keyword arguments). Labels are not needed.
        budget: How large the whole model may be.
        families: Methods to choose from, site by site.
        selector: How ranks are chosen; a given one is taken as it is.
        only: Paths or patterns of the sites to compress; None is all.
        exclude: Paths or patterns of sites to leave alone.
        positions: Positions a sample (pixels of a feature map, tokens) to look at for the statistics, drawn by the
            seed; None is all. On the ResNets we measured, 32 to 128 gave the accuracy of all of them at a third of
            the cost.
        seed: Seed of everything that is drawn; the same seed gives the same bits on one machine.
        progress: Told about every step of every stage.

    Returns:
        The compressed model, the plan and the report.

    Raises:
        ModelError, DataError, NumericsError, SiteError, OptionError: Bad input; nothing has been changed.
        BudgetError: The budget cannot be met; the smallest reachable value is named.
    """
    clock = _Clock()
    if not isinstance(budget, Budget):
        raise OptionError("budget", law="a rankfold.Budget", got=repr(budget), cure="try rankfold.Budget(params=0.5)")
    check_families(families)
    check_model(model)
    batches = as_batches(data)
    example = next(iter(batches))
    with progress("trace", None):
        sites = clock.time("trace", lambda: find_sites(model, example, only=only, exclude=exclude))
    notes = [] if sites.graph.reason is None else [f"no graph, module hooks were used: {sites.graph.reason}"]
    fit, held_out = Split(batches, HELD_OUT, held_out=False), Split(batches, HELD_OUT, held_out=True)
    judged = held_out if any(True for _ in held_out) else batches
    if judged is batches:
        notes.append(
            f"fewer than {HELD_OUT} calibration samples: candidates were judged on the samples they were fitted on"
        )
    stats = clock.time(
        "statistics",
        lambda: collect(
            model, fit, sites=sites, statistics=needed(families), positions=positions, seed=seed, progress=progress
        ),
    )
    curves = clock.time("curves", lambda: measure(model, stats, sites=sites, families=families, progress=progress))
    tried = _candidates(
        [Lagrangian(), Uniform()] if selector is None else [selector],
        lambda chosen: make_plan(curves, budget=budget, selector=chosen, seed=seed, calibration=stats.manifest),
    )
    results: list[tuple[Comparison, nn.Module, Plan]] = []
    with progress("candidates", len(tried)) as advance:
        for plan in tried:

            def carry_out(plan: Plan = plan) -> tuple[Comparison, nn.Module, Plan]:
                check_plan(model, plan)
                compressed = install_shells(copied(model), plan, filler(stats))
                return compare(model, compressed, judged), compressed, plan

            results.append(clock.time("candidates", carry_out))
            advance()
    comparison, compressed, plan = min(results, key=lambda result: result[0].divergence)
    candidates = tuple(
        Candidate(str((each.selector or {}).get("name", "")), seen.divergence, seen.agreement, each is plan)
        for seen, _, each in results
    )
    with progress("latency", None):
        latency = clock.time("latency", lambda: latency_ratio(model, compressed, example))
    report = Report(
        sites.model,
        rows(sites, plan),
        sites.cost,
        count(compressed, example),
        plan.budget,
        latency,
        comparison,
        candidates,
        clock.seconds,
        tuple(notes),
        seed,
        environment(),
    )
    return Compressed(compressed, plan, report)


def _candidates(selectors: Sequence[RankSelector], make: Callable[[RankSelector], Plan]) -> list[Plan]:
    """One plan a selector, equal ones once; a selector that cannot meet the budget drops out while another can."""
    plans: list[Plan] = []
    failure: BudgetError | None = None
    for selector in selectors:
        try:
            plan = make(selector)
        except BudgetError as cause:
            failure = cause
            continue
        if all(plan.decisions != other.decisions for other in plans):
            plans.append(plan)
    if not plans and failure is not None:
        raise failure
    return plans


class _Clock:
    """Wall-clock seconds a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work and add its seconds to a stage."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

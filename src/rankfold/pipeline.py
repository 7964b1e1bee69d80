"""The whole road in one call: a trained network and a budget in, a smaller network out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rankfold.applying import carry_out
from rankfold.curves import DEFAULT_FAMILIES, check_families, measure, needed
from rankfold.decompositions import Decomposition
from rankfold.errors import BudgetError, OptionError, PlanError, shown
from rankfold.graph.refusals import BY_BATCH
from rankfold.graph.sites import Sites, Skip, check_model, check_module, check_selection, find_sites
from rankfold.graph.trace import Batch, batch_size, device_of, take
from rankfold.graph.values import Memory, Spill, parse_memory
from rankfold.metrics.compare import Comparison, compare
from rankfold.metrics.counted import count
from rankfold.metrics.latency import latency_ratio
from rankfold.plan import Plan, budget_of
from rankfold.planning import check_kinds, make_plan
from rankfold.progress import Progress, check_progress, silent
from rankfold.ranks import Budget, Lagrangian, RankSelector, Uniform
from rankfold.repair import Lockstep
from rankfold.repair.site import always_solve
from rankfold.report.data import Candidate, Report, environment, rows
from rankfold.statistics import Statistics
from rankfold.statistics.collect import check_positions, collect
from rankfold.statistics.data import HELD_OUT, Split, as_batches
from rankfold.statistics.distributed import together, world
from rankfold.statistics.draws import check_seed
from rankfold.statistics.gradients import SAMPLES, collect_gradients
from rankfold.surgery import check_copy, check_plan, copied
from rankfold.work import Work, facts_of

DEFAULT_REPAIR = Lockstep()
POSITIONS = 64  # a sample, for the statistics
LATENCY_SAMPLES = 32  # at most so many of the first batch are timed, where the model takes a batch of any size
ENOUGH = 24  # positions for each feature of a site: with many samples, fewer a sample do
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


@together
def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget,
    families: Sequence[Decomposition] = DEFAULT_FAMILIES,
    repair: Lockstep | None = DEFAULT_REPAIR,
    selector: RankSelector | None = None,
    weighting: bool = True,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    positions: int | None = POSITIONS,
    seed: int = 0,
    work_dir: str | Path | None = None,
    memory: Memory = None,
    progress: Progress = silent,
) -> Compressed:
    """Compress a trained network under one budget, without training it.

    One in ten calibration samples is held out and never fitted on. With `selector=None` two plans are made, one by
    `Lagrangian()` and one by `Uniform()`, both are carried out, and the one whose outputs on the held-out samples are
    closer to the original's is returned.

    Where torch.distributed is initialised with several processes, all of them call this with the same arguments: each
    runs its share of the data, and all return the same plan and weights, those of one process up to rounding. A
    process that fails ends the others.

    Args:
        model: The trained network; left untouched, its training mode too.
        data: Calibration inputs, a re-iterable of batches (tensor, tuple whose first item is the input, or dict of
            keyword arguments). Labels are not needed.
        budget: How large the whole model may be.
        families: Methods to choose from, site by site.
        repair: How sites are re-solved at apply time; None leaves the factors as decomposed.
        selector: How ranks are chosen; a given one is taken as it is.
        weighting: Weigh errors by what the network's output feels of them (one backward pass over 256 samples).
        only: Paths or patterns of the sites to compress; None is all.
        exclude: Paths or patterns of sites to leave alone.
        positions: Positions a sample (pixels of a feature map, tokens) to look at for the statistics, drawn by the
            seed; None is all. At most so many: where a list of batches has many samples, 24 positions for each
            feature of a site are enough (16,384 at least). On the ResNets we measured, a few dozen gave the accuracy
            of all of them at a fraction of the cost.
        seed: Seed of everything that is drawn; the same seed gives the same bits on one machine.
        work_dir: A directory that keeps finished statistics, gradients, curves and solved layers. A run that was killed
            and is started again with the same arguments goes on from there and gives the same bits; another budget,
            selector or repair takes over what does not depend on it.
        memory: Most bytes that activations may take, as an int or a text such as "512MB" (1 MB is 2²⁰ bytes). Half of
            them are for the values that the repair carries from layer to layer; what is beyond lies in nameless
            temporary files. It changes no bit of the result. None is no limit.
        progress: Told about every step of every stage.

    Returns:
        The compressed model, the plan and the report.

    Raises:
        ModelError, DataError, NumericsError, SiteError, OptionError: Bad input; nothing has been changed.
        BudgetError: The budget cannot be met; the smallest reachable value is named.
        WorkDirError: `work_dir` is of another model, other data or other options; what differs is named.
        DistributedError: Another process failed or is gone, or was given other arguments.
    """
    if not isinstance(budget, Budget):
        raise OptionError("budget", law="a rankfold.Budget", got=repr(budget), cure="try rankfold.Budget(params=0.5)")
    if repair is not None and not isinstance(repair, Lockstep):
        raise OptionError(
            "repair", law="an instance of Lockstep, or None", got=repr(repair), cure="try rankfold.Lockstep()"
        )
    if selector is not None:
        check_kinds({"selector": (selector, RankSelector)})
    if not isinstance(weighting, bool):
        raise OptionError("weighting", law="True or False", got=shown(weighting), cure="pass a bool")
    if work_dir is not None and not isinstance(work_dir, (str, os.PathLike)):
        raise OptionError("work_dir", law="the path of a directory, or None", got=shown(work_dir), cure="pass a path")
    check_families(families)
    check_selection(only, exclude)
    check_positions(positions)
    check_seed(seed)
    check_progress(progress)
    limit = parse_memory(memory)
    job = _Job.start(model, data, progress, only=only, exclude=exclude, limit=limit)
    if job.sites.graph.program is None:
        repair = None
    chosen_by = [type(method).__name__ for method in (*families, selector)]
    world().agree("options", repr((chosen_by, budget, repair, weighting, positions, seed)))
    if work_dir is not None:
        if world().size > 1:
            raise OptionError(
                "work_dir", law="one process", got=f"{world().size} processes", cure="leave work_dir out under torchrun"
            )
        facts = facts_of(
            model, job.sites, job.batches, families=families, weighting=weighting, positions=positions, seed=seed
        )
        job.work = Work.open(work_dir, facts, device_of(model))
    job.collect(
        needed(families),
        positions=positions,
        enough=ENOUGH,
        seed=seed,
        gradient_samples=SAMPLES if weighting else None,
    )
    stats = job.stats
    curves = job.clock.time(
        "curves",
        lambda: job.work.curves(
            job.sites,
            families,
            lambda: measure(model, stats, sites=job.sites, families=families, progress=progress, world=world()),
        ),
    )
    tried = _candidates(
        [Lagrangian(), Uniform()] if selector is None else [selector],
        lambda chosen: make_plan(
            curves, budget=budget, selector=chosen, seed=seed, calibration=stats.manifest, repair=repair
        ),
    )
    with progress("candidates", len(tried)) as advance:
        attempts = []
        for plan in tried:
            attempts.append(job.attempt(plan))
            advance()
    return job.finish(attempts)


@together
def execute(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    memory: Memory = None,
    progress: Progress = silent,
) -> Compressed:
    """Carry out a plan that is there already, and report on it as `compress` does.

    A plan that nobody edited gives, on the same data, the very weights it was made for.

    Args:
        model: The original; left untouched.
        data: Calibration inputs.
        plan: The plan, edited or not; its `seed` and `calibration` say how statistics are collected.
        memory: As for `compress`.
        progress: Told about every step.

    Returns:
        As `compress`; the plan's calibration is that of `data`. The report notes each bound of the plan's own budget
        that an edited plan no longer meets.

    Raises:
        ModelError, DataError, OptionError: Bad input, as for `compress`.
        PlanError: It is no plan, or does not fit the model.
        SiteError: It decides on a layer that is no site.
    """
    check_module(model)
    if not isinstance(plan, Plan):
        raise PlanError("plan", law="an instance of Plan", got=shown(plan), cure="read a file with rankfold.Plan.load")
    check_progress(progress)
    budget = budget_of(plan.budget, "plan")
    check_plan(model, plan)
    job = _Job.start(model, data, progress, limit=parse_memory(memory))
    decided = tuple(job.sites.at(decision.site) for decision in plan.decisions)
    left = tuple(Skip(site.path, "not in the plan") for site in job.sites if site not in decided)
    job.sites = replace(job.sites, sites=decided, skips=(*job.sites.skips, *left))
    job.notes.append("a given plan was carried out")
    if plan.repair is not None and job.sites.graph.program is None:
        plan = replace(plan, repair=None)
    calibration = plan.calibration
    job.collect(
        needed([decision.method for decision in plan.changes if decision.method is not None]),
        positions=calibration.get("positions", POSITIONS),
        enough=calibration.get("enough"),
        seed=plan.seed,
        gradient_samples=calibration.get("gradient_samples"),
    )
    if calibration.get("sha256", job.stats.manifest["sha256"]) != job.stats.manifest["sha256"]:
        job.notes.append("the calibration data is not the one that the plan was made with")
    done = job.finish([job.attempt(replace(plan, calibration=job.stats.manifest))])
    return done if budget is None else replace(done, report=_held_to(done.report, budget))


def _held_to(report: Report, budget: Budget) -> Report:
    """The report, with a note for each bound of the plan's own budget that the compressed model is over."""
    got, asked = report.after.amounts(), budget.to_json()
    over = tuple(
        f"the plan's own budget is not met: {name} at most {bound} (asked: {shown(asked[name])}), got {got[name]}"
        for name, bound in budget.bounds(report.before).items()
        if got[name] > bound
    )
    return replace(report, notes=(*report.notes, *over))


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One plan carried out."""

    comparison: Comparison
    model: nn.Module
    plan: Plan
    remarks: tuple[str, ...]


@dataclass(eq=False)
class _Job:
    """What the stages of one compression share."""

    model: nn.Module
    batches: Iterable[Batch]
    sites: Sites
    judged: Iterable[Batch]
    stats: Statistics
    notes: list[str]
    clock: _Clock
    progress: Progress
    spill: Spill
    work: Work = field(default_factory=Work)

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: Any,
        progress: Progress,
        *,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        limit: int | None = None,
    ) -> _Job:
        """Check the inputs and find the sites."""
        check_model(model)
        spill = Spill(None if limit is None else limit // 2)
        batches, clock, notes = as_batches(data), _Clock(spill.tidy), []
        example = next(iter(batches))
        with progress("trace", None):
            sites = clock.time("trace", lambda: find_sites(model, example, only=only, exclude=exclude))
            check_copy(model, example)
        world().agree("model", repr((sites.fingerprint, [site.path for site in sites], sites.graph.reason is None)))
        if by_batch := [skip.path for skip in sites.skips if BY_BATCH in skip.reason]:
            notes.append(f"{BY_BATCH}: {', '.join(by_batch[:5])}")
        if sites.graph.reason is not None:
            notes.append(f"no graph, module hooks were used, and there was no lockstep repair: {sites.graph.reason}")
        judged: Iterable[Batch] = Split(batches, HELD_OUT, held_out=True)
        if not any(True for _ in judged):
            judged = batches
            notes.append(
                f"fewer than {HELD_OUT} calibration samples: candidates were judged on the samples they were fitted on"
            )
        return cls(model, batches, sites, judged, Statistics({}), notes, clock, progress, spill)

    def collect(
        self,
        statistics: Sequence[str],
        *,
        positions: int | None,
        enough: int | None,
        seed: int,
        gradient_samples: int | None,
    ) -> None:
        """Collect on the samples that are fitted on."""
        fit = Split(self.batches, HELD_OUT, held_out=False)

        def moments() -> Statistics:
            return collect(
                self.model,
                fit,
                sites=self.sites,
                statistics=statistics,
                positions=positions,
                enough=enough,
                seed=seed,
                progress=self.progress,
                world=world(),
            )

        self.stats = self.clock.time("statistics", lambda: self.work.statistics(moments))
        if gradient_samples is None:
            return

        def gradients() -> str | None:
            return collect_gradients(
                self.model,
                fit,
                self.stats,
                sites=self.sites,
                samples=gradient_samples,
                seed=seed,
                progress=self.progress,
                world=world(),
            )

        why = self.clock.time("gradients", lambda: self.work.gradients(self.stats, gradients))
        if why is not None:
            self.notes.append(f"errors are relative to each layer, not weighted by the network's output: {why}")

    def attempt(self, plan: Plan) -> _Attempt:
        """Carry a plan out on a copy and compare it on the held-out samples."""

        world().agree("plan", plan.to_json())

        def work() -> _Attempt:
            compressed, remarks = carry_out(
                self.model,
                copied(self.model),
                plan,
                sites=self.sites,
                stats=self.stats,
                batches=self.batches,
                spill=self.spill,
                recall=self.work.sites(self.model, plan) if plan.repair is not None else always_solve,
                progress=self.progress,
                world=world(),
            )
            return _Attempt(compare(self.model, compressed, self.judged, world=world()), compressed, plan, remarks)

        return self.clock.time("apply" if plan.repair is None else "repair", work)

    def finish(self, attempts: Sequence[_Attempt]) -> Compressed:
        """Take the attempt closest to the original, and report."""
        best = min(attempts, key=lambda attempt: attempt.comparison.divergence)
        candidates = tuple(
            Candidate(
                str((each.plan.selector or {}).get("name", "")),
                each.comparison.divergence,
                each.comparison.agreement,
                each is best,
            )
            for each in attempts
        )
        example = next(iter(self.batches))
        with self.progress("latency", None):
            few = example
            if self.sites.graph.program is not None and self.sites.graph.static_batch is None:
                few = take(example, torch.arange(min(batch_size(example), LATENCY_SAMPLES)))
            latency = self.clock.time("latency", lambda: _one_latency(self.model, best.model, few))
        report = Report(
            self.sites.model,
            rows(self.sites, best.plan),
            self.sites.cost,
            count(best.model, example),
            best.plan.budget,
            latency,
            best.comparison,
            candidates if len(candidates) > 1 else (),
            self.clock.seconds,
            (*self.notes, *best.remarks),
            best.plan.seed,
            environment(),
        )
        return Compressed(best.model, best.plan, report)


def _one_latency(original: nn.Module, compressed: nn.Module, example: Batch) -> float:
    """Measured by the first process while all others wait, so that none disturbs it."""
    together_with = world()
    latency = torch.zeros(1, dtype=torch.float64)
    if together_with.owns(0):
        latency[0] = latency_ratio(original, compressed, example)
    together_with.broadcast_([latency], 0)
    return float(latency)


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
    """Wall-clock seconds a stage.

    Args:
        after: Called after each stage.
    """

    def __init__(self, after: Callable[[], None]) -> None:
        self._after = after
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work and add its seconds to a stage."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self._after()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

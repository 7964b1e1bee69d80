"""One model and its data, analysed once and compressed to any number of budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from rankfold.allocation import Budget
from rankfold.channels.narrowing import narrowed_sites
from rankfold.clock import Clock
from rankfold.cost.counted import count
from rankfold.data.batches import Batch
from rankfold.data.running import device_of
from rankfold.data.splits import HELD_OUT, Split, as_batches, digest, first_of, held_out_of
from rankfold.distributed import together, world
from rankfold.errors import OptionError
from rankfold.forecasting.forecast import Forecast, forecast_of
from rankfold.forecasting.prediction import Course
from rankfold.graph.spill import Spill
from rankfold.options import Options, settled_budget
from rankfold.outputs.taken import LOOKED_AT, Outputs, Taken, outputs_to_json, settled
from rankfold.progress import Progress
from rankfold.proposals import FEWEST, Asked, Basis, Cuts, Proposer, numbers_of, proposers_of
from rankfold.report.compressed import Compressed
from rankfold.report.data import Candidate, Report, environment, rows
from rankfold.report.signature import Signature
from rankfold.sites.copies import check_copy
from rankfold.sites.finding import sites_in
from rankfold.sites.models import COMPILED, check_model, is_compiled
from rankfold.sites.refusals import BY_BATCH
from rankfold.sites.site import Sites
from rankfold.statistics import Statistics
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import SAMPLES, collect_gradients
from rankfold.statistics.size import bounded, machine_memory
from rankfold.store.work import Work, facts_of
from rankfold.trials.attempts import LATENCY_SAMPLES, Attempt, one_latency, uncalled
from rankfold.trials.limits import Limit
from rankfold.trials.trials import Trials

ENOUGH = 24  # positions for each feature of a site: with many samples, fewer of each sample are enough
SHUFFLED = (
    "the data gives other batches at each pass: held-out samples of one pass were fitted on in another, so candidates "
    "and the comparison are judged too well; pass a list of batches, or a loader that does not shuffle"
)


@dataclass(eq=False)
class Session:
    """A network that was analysed once, by `prepare`.

    Statistics and curves are computed when they are first needed, and serve every budget after that.

    Attributes:
        model: The original; left untouched. Where it holds an `nn.MultiheadAttention`, a copy in which it is split into
            linear layers, and which shares all other tensors with it.
        sites: Layers of it that can be made smaller, and reasons why the others cannot.
    """

    model: nn.Module
    batches: Iterable[Batch]
    sites: Sites
    judged: Iterable[Batch]
    notes: list[str]
    clock: Clock
    progress: Progress
    spill: Spill
    every: int = HELD_OUT  # number of samples of which one is held out
    held_out: bool = True  # whether plans are judged on samples that nothing was fitted on
    stats: Statistics = field(default_factory=lambda: Statistics({}))
    work: Work = field(default_factory=Work)
    outputs: Taken | None = None  # kinds of the model's outputs, once they are settled
    options: Options = field(default_factory=lambda: Options((), None))
    traced: float = 0.0  # seconds that finding the sites took
    given: nn.Module | None = None  # the user's model, which is compared and timed; None is `model`

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
        every: int | None = None,
        split: Sequence[str] | None = None,
    ) -> Session:
        """Check the inputs and find the sites.

        Args:
            model: The original.
            data: Calibration inputs.
            progress: Callback for every step.
            only: As for `find_sites`.
            exclude: As for `find_sites`.
            limit: Maximum number of bytes that activations and moments may take; None for none.
            every: Number of samples of which one is held out; None chooses it by their number.
            split: Paths of the attention that is split, as a plan records them; None tries which can be.
        """
        given, model = model, check_model(model)
        spill = Spill(None if limit is None else limit // 2)
        batches, clock, notes = as_batches(data), Clock(spill.tidy), []
        example = first_of(batches)
        if is_compiled(given):
            notes.append(COMPILED)
        if digest(first_of(batches)) != digest(example):
            notes.append(SHUFFLED)
        with progress("trace", None):
            whole = model
            model, sites = clock.time(
                "trace", lambda: sites_in(whole, example, only=only, exclude=exclude, split=split)
            )
            check_copy(whole, example)
        world().agree("model", repr((sites.fingerprint, [site.path for site in sites], sites.graph.reason is None)))
        if by_batch := [skip.path for skip in sites.skips if BY_BATCH in skip.reason]:
            notes.append(f"{BY_BATCH}: {', '.join(by_batch[:5])}")
        if sites.split:
            named = ", ".join(path or "(the model)" for path in sites.split[:5])
            named += f" and {len(sites.split) - 5} more" * (len(sites.split) > 5)
            notes.append(f"attention became linear layers, which plain code runs and no fused layer: {named}")
        if sites.graph.reason is not None:
            notes.append(f"no graph, module hooks were used, and there was no lockstep repair: {sites.graph.reason}")
        if sites.uncounted:
            notes.append(f"not counted in MACs: {', '.join(sites.uncounted[:5])}")
        every = held_out_of(batches) if every is None else every
        judged: Iterable[Batch] = Split(batches, every, held_out=True)
        held_out = any(True for _ in judged)
        if not held_out:
            judged = batches
            notes.append(
                f"fewer than {every} calibration samples: candidates were judged on the samples they were fitted on"
            )
        found = model, batches, sites, judged, notes, clock, progress, spill
        return cls(*found, every=every, held_out=held_out, traced=clock.seconds["trace"], given=whole)

    def _bound_moments(self) -> None:
        """Leave alone the layers whose moments would take too much memory; see `bounded`."""
        options = self.options
        known = {skip.path for skip in self.sites.skips}
        self.sites = bounded(
            self.sites,
            options.collected,
            repaired=options.repair is not None,
            limit=None if options.limit is None else options.limit // 2,
            machine=machine_memory(device_of(self.model)),
        )
        left = [f"{skip.path} ({skip.reason})" for skip in self.sites.skips if skip.path not in known]
        if left:
            self.notes.append(f"left alone for the memory that their moments would take: {'; '.join(left[:5])}")

    def collect(
        self,
        statistics: Sequence[str],
        *,
        positions: int | None,
        enough: int | None,
        seed: int,
        gradient_samples: int | None,
        outputs: Outputs = None,
    ) -> None:
        """Settle the kinds of the outputs, and collect statistics over the samples that are fitted on."""
        fit = Split(self.batches, self.every, held_out=False, labels=True)

        def moments() -> Statistics:
            stats = collect(
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
            stats.manifest["held_out"] = self.every
            return stats

        self.stats = self.clock.time("statistics", lambda: self.work.statistics(moments))
        taken = self.outputs = settled(self.model, fit, outputs, self.sites.graph.at_once(LOOKED_AT))
        if taken.passed:
            self.notes.append(f"outputs that were not looked at: {', '.join(taken.passed)}")
        if outputs is not None:
            self.stats.manifest["outputs"] = outputs_to_json(outputs)
        if gradient_samples is None:
            return
        loss = self.options.selector is not None and "changes" in self.options.selector.reads

        def gradients() -> str | None:
            return collect_gradients(
                self.model,
                fit,
                self.stats,
                sites=self.sites,
                samples=gradient_samples,
                outputs=taken,
                seed=seed,
                progress=self.progress,
                loss=loss,
                world=world(),
            )

        kept = "gradients of outputs and loss" if loss else "gradients"
        why = self.clock.time("gradients", lambda: self.work.gradients(self.stats, gradients, kept))
        if why is not None:
            self.notes.append(f"errors are relative to each layer, not weighted by the network's output: {why}")
        if unreached := self.stats.manifest.get("unreached"):
            self.notes.append(f"no gradient of the outputs reaches {', '.join(unreached)}: errors there count evenly")

    def opened(self, options: Options) -> Session:
        """This session with its options, and without the layers whose moments would take too much memory."""
        if any(family.cuts_fixed for family in options.families):
            self.sites = self.sites.with_fixed()
        if self.sites.graph.program is None:
            options = replace(options, repair=None)
        self.options = options
        self._bound_moments()
        return self

    @property
    def original(self) -> nn.Module:
        """The user's model, with its attention as it is: what compressed models are compared with and timed against."""
        return self.model if self.given is None else self.given

    @property
    def trials(self) -> Trials:
        """The trials, which carry plans out."""
        return Trials(
            self.model,
            self.original,
            self.batches,
            self.sites,
            self.judged,
            self.stats,
            self.every,
            self.outputs,
            self.work,
            self.clock,
            self.progress,
            self.spill,
        )

    @cached_property
    def proposers(self) -> list[Proposer]:
        """The proposers of plans, made after the statistics that they read are collected."""
        self._collect_all()
        return proposers_of(
            Basis(
                self.model,
                first_of(self.batches),
                self.sites,
                self.stats,
                self.options.families,
                self.options.seed,
                self.work,
                self.clock,
                self.progress,
                self.notes,
                self._cuts(),
            )
        )

    def _cuts(self) -> Cuts | None:
        trials = self.trials
        if trials.few.samples < FEWEST:
            return None
        return Cuts(trials.cut, self.stats.manifest, self.options.seed, self.progress, self.notes)

    @together
    def run(self, budget: Budget | None = None, *, limits: Sequence[Limit] = ()) -> Compressed:
        """Compress to a budget; the second run measures nothing again.

        Args:
            budget: Upper bounds on the size of the whole model; may be left out where a selector was given that does
                not look at it (`RankSelector.local`), and is then `Budget(params=1.0)`.
            limits: Limits on measured quantities that the result has to keep beside the budget; plans that break one
                drop out.

        Returns:
            The same as `compress`; the seconds of its report are those spent since the report before it.

        Raises:
            RankfoldError: The same errors as `compress`.
        """
        options = self.options
        budget = settled_budget(budget, options.selector)
        budget.check_counted(self.sites.uncounted)
        chosen_by = [type(method).__name__ for method in (*options.families, options.selector)]
        said = (chosen_by, budget, options.repair, options.weighting, options.outputs, options.positions, options.seed)
        world().agree("options", repr(said))
        proposers, trials = self.proposers, self.trials
        asked = Asked(budget, options.selector, options.repair, trials.score)
        proposals = [each for proposer in proposers for each in proposer.proposals(asked)]
        best, told = trials.best(proposals, budget, limits)
        return self.finish(best, told, budget=budget, notes=trials.notes)

    @together
    def forecast(self, budget: Budget | None = None) -> Forecast:
        """Predict the cost of `run` and the sizes it can reach, from a few forward passes of one batch."""
        options = self.options
        budget = settled_budget(budget, options.selector)
        budget.check_counted(self.sites.uncounted)
        many, few = numbers_of(options.families, chosen_by=options.selector is not None)
        course = Course(
            options.families,
            options.collected,
            options.repair,
            many,
            few,
            options.weighting,
            options.positions,
            ENOUGH,
            options.limit,
        )
        bounds = budget.bounds(self.sites.cost)
        return forecast_of(self.model, self.batches, self.sites, course, traced=self.traced, bounds=bounds)

    def _collect_all(self) -> None:
        """Open the directory that keeps work, and collect the statistics that the options need."""
        options = self.options
        if options.work_dir is not None:
            if world().size > 1:
                cure = "leave work_dir out under torchrun"
                raise OptionError("work_dir", law="one process", got=f"{world().size} processes", cure=cure)
            facts = facts_of(
                self.model,
                self.sites,
                self.batches,
                families=options.families,
                weighting=options.weighting,
                positions=options.positions,
                seed=options.seed,
            )
            facts["outputs"] = outputs_to_json(options.outputs)
            self.work = Work.open(options.work_dir, facts, device_of(self.model))
        self.collect(
            options.statistics,
            positions=options.positions,
            enough=ENOUGH,
            seed=options.seed,
            gradient_samples=SAMPLES if options.weighting else None,
            outputs=options.outputs,
        )

    def finish(
        self,
        best: Attempt,
        candidates: Sequence[Candidate] = (),
        *,
        budget: Budget | None = None,
        notes: Sequence[str] = (),
    ) -> Compressed:
        """Report on the attempt that is taken.

        Args:
            best: The attempt.
            candidates: Candidates that were tried.
            budget: Budget that the returned model must keep to; None where a plan is carried out as it is.
            notes: Remarks of this run.

        Raises:
            BudgetError: The model exceeds the budget.
        """
        example = first_of(self.batches)
        after = count(best.model, example) if best.cost is None else best.cost
        if budget is not None:
            budget.check_held(after, self.sites.cost)
        with self.progress("latency", None):
            graph = self.sites.graph
            timed = graph.at_once(LATENCY_SAMPLES) if graph.any_batch else None
            latency = self.clock.time("latency", lambda: one_latency(self.original, best.model, example, timed))
        report = Report(
            self.sites.model,
            rows(self.sites, best.plan, narrowed_sites(self.model, self.sites, best.plan.cuts), best.errors),
            self.sites.cost,
            after,
            best.plan.budget,
            latency.ratio,
            best.comparison,
            tuple(candidates) if len(candidates) > 1 else (),
            self.clock.taken(),
            (*self.notes, *notes, *uncalled(self.sites, best.plan)),
            best.plan.seed,
            environment(),
            (latency.lower, latency.upper),
            self.held_out,
            self.stats.manifest.get("samples"),
            Signature.of(example),
            best.details,
        )
        return Compressed(best.model, best.plan, report)

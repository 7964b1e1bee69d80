"""The stages of one compression, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from rankfold.applying import carry_out
from rankfold.attempts import Attempt, Clock, Compressed, one_latency, uncalled
from rankfold.candidates import FINALISTS, Maker, candidates_of, channel_ways, part_of
from rankfold.channels.narrowing import narrowed_sites
from rankfold.channels.remover import Remover
from rankfold.channels.widths import WidthSelector
from rankfold.decompositions import Decomposition, Interpolative
from rankfold.errors import BudgetError, NumericsError, PlanError, SelfCheckError, SiteError
from rankfold.graph.models import COMPILED, check_model, is_compiled
from rankfold.graph.refusals import BY_BATCH
from rankfold.graph.sites import Sites, find_sites
from rankfold.graph.trace import Batch, batch_size, device_of
from rankfold.graph.values import Spill
from rankfold.metrics.compare import compare
from rankfold.metrics.counted import count
from rankfold.metrics.outputs import Outputs, Taken, outputs_to_json, settled
from rankfold.plan import Plan
from rankfold.progress import Progress
from rankfold.ranks import Budget, RankSelector
from rankfold.registry import to_json
from rankfold.repair import Lockstep
from rankfold.repair.site import always_solve
from rankfold.report.data import Candidate, Report, environment, rows
from rankfold.statistics import Statistics
from rankfold.statistics.collect import collect
from rankfold.statistics.data import HELD_OUT, Split, as_batches, digest, first_of, held_out_of
from rankfold.statistics.distributed import world
from rankfold.statistics.gradients import collect_gradients
from rankfold.statistics.size import bounded, machine_memory
from rankfold.surgery import check_copy, copied
from rankfold.work import Work

DENSER = 2  # on a part of the samples so many times the positions of each are looked at
SHUFFLED = (
    "the data gives other batches at each pass: held-out samples of one pass were fitted on in another, so candidates "
    "and the comparison are judged too well; pass a list of batches, or a loader that does not shuffle"
)


@dataclass(eq=False)
class Job:
    """What the stages of one compression share."""

    model: nn.Module
    batches: Iterable[Batch]
    sites: Sites
    judged: Iterable[Batch]
    stats: Statistics
    notes: list[str]
    clock: Clock
    progress: Progress
    spill: Spill
    every: int = HELD_OUT  # one sample in so many is held out
    work: Work = field(default_factory=Work)
    held_out: bool = True  # whether what is judged on was fitted on by nothing
    outputs: Taken | None = None  # what the model's outputs are, once that is settled

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
    ) -> Job:
        """Check the inputs and find the sites; one sample in `every` is held out, None goes by their number."""
        given, model = model, check_model(model)
        spill = Spill(None if limit is None else limit // 2)
        batches, clock, notes = as_batches(data), Clock(spill.tidy), []
        example = first_of(batches)
        if is_compiled(given):
            notes.append(COMPILED)
        if digest(first_of(batches)) != digest(example):
            notes.append(SHUFFLED)
        with progress("trace", None):
            sites = clock.time("trace", lambda: find_sites(model, example, only=only, exclude=exclude))
            check_copy(model, example)
        world().agree("model", repr((sites.fingerprint, [site.path for site in sites], sites.graph.reason is None)))
        if by_batch := [skip.path for skip in sites.skips if BY_BATCH in skip.reason]:
            notes.append(f"{BY_BATCH}: {', '.join(by_batch[:5])}")
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
        return cls(
            model, batches, sites, judged, Statistics({}), notes, clock, progress, spill, every=every, held_out=held_out
        )

    def bound_moments(self, statistics: Sequence[str], repair: Lockstep | None, limit: int | None) -> None:
        """Leave alone the layers whose moments would take too much memory; see `bounded`.

        Args:
            statistics: Names of what will be collected.
            repair: The repair, or None.
            limit: Most bytes of values and moments, half each; None is the default's proportion.
        """
        known = {skip.path for skip in self.sites.skips}
        room = None if limit is None else limit // 2
        self.sites = bounded(
            self.sites,
            statistics,
            repaired=repair is not None,
            limit=room,
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
        """Settle what the outputs are, and collect on the samples that are fitted on."""
        fit = Split(self.batches, self.every, held_out=False)

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
        taken = self.outputs = settled(self.model, fit, outputs)
        if taken.passed:
            self.notes.append(f"outputs that were not looked at: {', '.join(taken.passed)}")
        if outputs is not None:
            self.stats.manifest["outputs"] = outputs_to_json(outputs)
        if gradient_samples is None:
            return

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
                world=world(),
            )

        why = self.clock.time("gradients", lambda: self.work.gradients(self.stats, gradients))
        if why is not None:
            self.notes.append(f"errors are relative to each layer, not weighted by the network's output: {why}")
        if unreached := self.stats.manifest.get("unreached"):
            self.notes.append(f"no gradient of the outputs reaches {', '.join(unreached)}: errors there count evenly")

    def removing(
        self,
        method: Interpolative,
        budget: Budget,
        forms: Sequence[Decomposition],
        *,
        selector: RankSelector | None,
        sizes: WidthSelector | None,
        seed: int,
        repair: Lockstep | None,
    ) -> list[Maker]:
        """Plans that remove channels: alone, and with other families for the rest of the way."""
        ways = channel_ways(selector, sizes, ranks=bool(forms))
        try:
            remover = self.clock.time(
                "curves",
                lambda: Remover.of(
                    self.model,
                    first_of(self.batches),
                    self.sites,
                    self.stats,
                    method,
                    selectors=[way.sizes for way in ways],
                    seed=seed,
                ),
            )
        except SiteError as cause:
            if not forms:
                raise
            self.notes.append(f"no channels were removed: {cause.got}")
            return []
        return [
            Maker(
                way.name,
                partial(
                    remover.plan,
                    budget,
                    share=way.share,
                    sizes=way.sizes,
                    families=forms,
                    selector=way.selector,
                    seed=seed,
                    repair=repair,
                    world=world(),
                ),
                always=way.always,
            )
            for way in ways
        ]

    def attempt(self, plan: Plan, part: Sequence[Batch] | None = None) -> Attempt:
        """Carry a plan out on a copy and compare it on the held-out samples.

        Args:
            plan: The plan.
            part: The samples it is carried out on; None is all.
        """
        world().agree("plan", plan.to_json())
        remembered = plan.repair is not None and part is None

        def work() -> Attempt:
            compressed, remarks = carry_out(
                self.model,
                copied(self.model),
                plan,
                sites=self.sites,
                stats=self.stats,
                batches=self.batches if part is None else part,
                spill=self.spill,
                recall=lambda base: self.work.sites(base, plan) if remembered else always_solve,
                progress=self.progress,
                world=world(),
                drawn_for=None if part is None else self.stats.manifest["samples"] // DENSER,
            )
            comparison = compare(self.model, compressed, self.judged, outputs=self.outputs, world=world())
            cost = count(compressed, first_of(self.batches)) if part is None else None
            return Attempt(comparison, compressed, plan, remarks, cost)

        return self.clock.time("apply" if plan.repair is None else "repair", work)

    def carried_out(self, makers: Sequence[Maker], budget: Budget) -> tuple[Attempt, list[Candidate]]:
        """The candidate closest to the original on held-out samples, and how all of them did.

        With a repair, where there are many, all are carried out on a part of the samples first, and the best on all;
        these are told of twice.

        Args:
            makers: Of the candidates.
            budget: Their budget.
        """
        part = None
        if self.sites.graph.static_batch is None:
            part = part_of(self.batches, self.stats.manifest["samples"], held_out=self.every, processes=world().size)
        chosen = [maker for maker in makers if maker.always or part is not None]
        plans = self.clock.time("plans", lambda: candidates_of(chosen, budget.bounds(self.sites.cost)))
        best: list[Attempt] = []
        repaired = any(plan.repair is not None for plan in plans.values())
        samples = None if part is None else sum(batch_size(batch) for batch in part)

        def whole(name: str, plan: Plan) -> Candidate:
            def work() -> Candidate:
                attempt = self.attempt(plan)
                if attempt.cost is not None:
                    budget.check_held(attempt.cost, self.sites.cost)
                if not best or attempt.comparison.divergence < best[0].comparison.divergence:
                    best[:] = [attempt]  # one compressed model at a time is kept
                return attempt.told(name)

            return replace(self.work.result(plan, "all", Candidate, work), selector=name)

        def trial(name: str, plan: Plan) -> Candidate:
            def work() -> Candidate:
                return self.attempt(plan, part).told(name, samples)

            return replace(self.work.result(plan, f"a part of {samples}", Candidate, work), selector=name)

        if part is None or not repaired or len(plans) <= FINALISTS:
            done, tried = self._each("candidates", plans, whole), []
        else:
            tried = self._each("trials", plans, trial)
            tried.sort(key=lambda one: one.divergence)
            ranked = {one.selector: plans[one.selector] for one in tried}
            done = self._each("candidates", ranked, whole, wanted=FINALISTS)
        least = min(done, key=lambda one: one.divergence)
        plan = plans[least.selector]
        if len(plans) > 1 and self.every < HELD_OUT and plan.repair == to_json(Lockstep()):
            # with few samples, what a repair fits to them may not hold for others
            bare = {f"{least.selector}, no repair": replace(plan, repair=None)}
            done += self._each("candidates", bare, whole, others=done)
            plans |= bare
            least = min(done, key=lambda one: one.divergence)
        if not best or best[0].plan is not plans[least.selector]:  # an earlier run judged it: its sites are kept
            best[:] = [self.attempt(plans[least.selector])]
        return best[0], [*(replace(one, taken=one is least) for one in done), *tried]

    def _each(
        self,
        stage: str,
        plans: Mapping[str, Plan],
        work: Callable[[str, Plan], Candidate],
        *,
        wanted: int | None = None,
        others: Sequence[Candidate] = (),
    ) -> list[Candidate]:
        """Some work for every plan, or for as many as are wanted; one that fails drops out while another is left.

        Args:
            stage: For the progress.
            plans: By name.
            work: What is done for each.
            wanted: How many; None is all.
            others: What is done already, and left where all of these fail.
        """
        done: list[Candidate] = []
        failures: list[SelfCheckError | PlanError | NumericsError | BudgetError] = []
        wanted = len(plans) if wanted is None else min(wanted, len(plans))
        with self.progress(stage, wanted) as advance:
            for name, plan in plans.items():
                if len(done) == wanted:
                    break
                try:
                    done.append(work(name, plan))
                except (SelfCheckError, PlanError, NumericsError, BudgetError) as cause:
                    if (len(plans) == 1 and not others) or world().size > 1:
                        raise
                    failures.append(cause)
                    self.notes.append(f"candidate {name} was dropped: {cause}")
                    continue
                advance()
        if not done and not others:
            raise failures[0]
        return done

    def finish(
        self, best: Attempt, candidates: Sequence[Candidate] = (), *, budget: Budget | None = None
    ) -> Compressed:
        """Report on the attempt that is taken.

        Args:
            best: The attempt.
            candidates: All that were tried.
            budget: What the model that is handed back must keep to; None where a plan is carried out as it is.

        Raises:
            BudgetError: It does not.
        """
        example = first_of(self.batches)
        after = count(best.model, example) if best.cost is None else best.cost
        if budget is not None:
            budget.check_held(after, self.sites.cost)
        with self.progress("latency", None):
            whole = self.sites.graph.program is None or self.sites.graph.static_batch is not None
            latency = self.clock.time("latency", lambda: one_latency(self.model, best.model, example, whole=whole))
        report = Report(
            self.sites.model,
            rows(self.sites, best.plan, narrowed_sites(self.model, self.sites, best.plan.cuts)),
            self.sites.cost,
            after,
            best.plan.budget,
            latency.ratio,
            best.comparison,
            tuple(candidates) if len(candidates) > 1 else (),
            self.clock.seconds,
            (*self.notes, *best.remarks, *uncalled(self.sites, best.plan)),
            best.plan.seed,
            environment(),
            (latency.lower, latency.upper),
            self.held_out,
            self.stats.manifest.get("samples"),
        )
        return Compressed(best.model, best.plan, report)

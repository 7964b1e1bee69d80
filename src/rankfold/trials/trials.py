"""Proposals → the plan whose outputs are closest to the original's on held-out samples, carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from rankfold.allocation import Budget
from rankfold.applying import carry_out
from rankfold.clock import Clock
from rankfold.comparison.compare import compare
from rankfold.comparison.few import Few
from rankfold.comparison.objectives import Objective
from rankfold.cost.counted import count
from rankfold.data.batches import Batch, batch_size, micro_batches
from rankfold.data.splits import HELD_OUT, Part, Split, first_of, merged
from rankfold.distributed import world
from rankfold.graph.spill import Spill
from rankfold.outputs.taken import Taken
from rankfold.plan import Plan
from rankfold.progress import Progress
from rankfold.proposals import Proposal, plans_from
from rankfold.proposals._measured import SAMPLES, SHARE, WRONG
from rankfold.registry import to_json
from rankfold.repair import Lockstep
from rankfold.repair.site import always_solve
from rankfold.report.data import Candidate
from rankfold.sites.copies import copied
from rankfold.sites.site import Sites
from rankfold.statistics import Statistics
from rankfold.store.work import Work
from rankfold.trials.attempts import Attempt, Lost, Scored
from rankfold.trials.limits import Limit

FINALISTS = 3  # number of the plans tried on a part of the samples that are carried out on all
FEWEST = 64  # least number of samples of that part
SPARSEST = 8  # the part has at least one sample in so many
LARGEST_BATCH = 128  # small batches of the part are put together up to this: a trial costs calls more than samples
DENSER = 2  # factor by which more positions of each sample are looked at on the part
# With few samples, what the default repair fits to them may not hold for others.
WEAKER: Mapping[str, Lockstep | None] = {"anchor 0.5": Lockstep(anchor=0.5), "no repair": None}


@dataclass(eq=False)
class Trials:
    """Carries plans out on copies of one model and judges them.

    Attributes:
        model: The original, with its attention split.
        original: The original as it was given, which compressed models are compared with.
        batches: The calibration data.
        sites: Sites of the model.
        judged: The held-out samples, or all where none are held out.
        stats: Statistics of the model.
        every: Number of samples of which one is held out.
        outputs: Kinds of the model's outputs.
        work: Store of finished work.
        clock: Clock that adds up the seconds of each stage.
        progress: Callback for every step.
        spill: Store of the values of a repair.
        notes: Remarks for the report: plans that dropped out.
    """

    model: nn.Module
    original: nn.Module
    batches: Iterable[Batch]
    sites: Sites
    judged: Iterable[Batch]
    stats: Statistics
    every: int
    outputs: Taken | None
    work: Work
    clock: Clock
    progress: Progress
    spill: Spill
    notes: list[str] = field(default_factory=list)
    _tried: dict[str, Candidate] = field(default_factory=dict, init=False)
    _failed: dict[str, Exception] = field(default_factory=dict, init=False)

    @property
    def at_once(self) -> int | None:
        """Samples of a batch that are compared at once; None is all, where the model may take no other number."""
        graph = self.sites.graph
        return graph.at_once(LARGEST_BATCH) if graph.any_batch else None

    def attempt(self, plan: Plan, part: Sequence[Batch] | None = None) -> Attempt:
        """Carry a plan out on a copy and compare it on the held-out samples.

        Args:
            plan: The plan.
            part: The samples it is carried out on; None is all.
        """
        world().agree("plan", plan.to_json())
        remembered = plan.repair is not None and part is None

        def work() -> Attempt:
            carried = carry_out(
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
            comparison = compare(
                self.original, carried.model, self.judged, outputs=self.outputs, at_once=self.at_once, world=world()
            )
            cost = count(carried.model, first_of(self.batches)) if part is None else None
            return Attempt(comparison, carried.model, plan, carried.details, cost, carried.errors)

        return self.clock.time("apply" if plan.repair is None else "repair", work)

    @cached_property
    def few(self) -> Few:
        """The samples that one cut at a time is carried out on: a sixteenth of those that are fitted on, 16 to 32."""
        if self.outputs is None:
            raise TypeError("the kinds of the outputs are not settled yet")
        graph, fitted = self.sites.graph, Split(self.batches, self.every, held_out=False)
        wanted = min(max(self.stats.manifest["samples"] // SHARE, SAMPLES[0]), SAMPLES[1])
        at_once = graph.at_once(-(-wanted // world().size)) if graph.any_batch else None
        return Few.of(self.original, fitted, wanted, self.outputs, at_once=at_once, world=world())

    def cut(self, plan: Plan) -> float:
        """The divergence, on a few samples, of a plan of one cut carried out without repair."""
        few = self.few

        def work() -> Lost:
            carried = carry_out(
                self.model,
                copied(self.model),
                plan,
                sites=self.sites,
                stats=self.stats,
                batches=few.batches or self.batches,
                world=world(),
            )
            return Lost(few.lost(carried.model))

        return self.work.result(plan, "a few", Lost, work).divergence

    @cached_property
    def part(self) -> list[Batch] | None:
        """The samples that many plans are tried on; None where these would be too few, or all have to be there."""
        if self.sites.graph.static_batch is not None:
            return None
        return part_of(self.batches, self.stats.manifest["samples"], held_out=self.every, processes=world().size)

    def tried(self, plan: Plan) -> Candidate:
        """Candidate, without a name, of a plan carried out on the part of the samples, or on all if there is none.

        Args:
            plan: The plan; one that was tried already is not carried out again. (Where there is no part, the plan that
                is taken is: compressed models are not kept, since each is as large as the network.)
        """
        key = plan.to_json()
        if key in self._failed:
            raise self._failed[key]
        if key not in self._tried:
            samples = None if self.part is None else sum(batch_size(batch) for batch in self.part)
            on = "all, for a selector" if samples is None else f"a part of {samples}"
            try:
                self._tried[key] = self.work.result(
                    plan, on, Candidate, lambda: self.attempt(plan, self.part).told("", samples)
                )
            except WRONG as cause:
                self._failed[key] = cause
                raise
        return self._tried[key]

    def score(self, plan: Plan, objective: Objective | None = None) -> float:
        """The divergence of a plan by `tried`; less is better, and infinity is a plan whose model is wrong.

        Args:
            plan: The plan.
            objective: What is measured in the divergence's place, on the same held-out samples.
        """
        try:
            if objective is not None:
                return self._objective(plan, objective)
            return self.tried(plan).divergence
        except WRONG:
            if world().size > 1:
                raise
            return math.inf

    @property
    def _labelled(self) -> Iterable[Batch]:
        """The samples that plans are judged on, with their labels."""
        return replace(self.judged, labels=True) if isinstance(self.judged, Split) else self.judged

    def _objective(self, plan: Plan, objective: Objective) -> float:
        """An objective of a plan carried out on the part of the samples, or on all if there is none."""
        on = f"{objective!r} on {'all' if self.part is None else 'a part'}"

        def work() -> Scored:
            return Scored(objective.of(self.original, self.attempt(plan, self.part).model, self._labelled))

        return self.work.result(plan, on, Scored, work).value

    def best(
        self, proposals: Sequence[Proposal], budget: Budget, limits: Sequence[Limit] = ()
    ) -> tuple[Attempt, list[Candidate]]:
        """The plan closest to the original on held-out samples, and the candidates of all plans.

        With a repair and many plans, all of them are carried out on a part of the samples first, and the best on all;
        the best have two candidates each.

        Args:
            proposals: Proposals of plans.
            budget: Budget of the plans.
            limits: Limits that the result has to keep beside it.
        """
        part = self.part
        chosen = [proposal for proposal in proposals if proposal.always or part is not None]
        plans = self.clock.time("plans", lambda: plans_from(chosen, budget.bounds(self.sites.cost)))
        best: list[Attempt] = []
        repaired = any(plan.repair is not None for plan in plans.values())

        def whole(name: str, plan: Plan) -> Candidate:
            def work() -> Candidate:
                attempt = self.attempt(plan)
                if attempt.cost is not None:
                    budget.check_held(attempt.cost, self.sites.cost)
                for limit in limits:
                    limit.check(attempt)
                if not best or attempt.comparison.divergence < best[0].comparison.divergence:
                    best[:] = [attempt]  # one compressed model at a time is kept
                return attempt.told(name)

            if limits:  # the results of an earlier run are not known to keep to them
                return replace(work(), selector=name)
            return replace(self.work.result(plan, "all", Candidate, work), selector=name)

        def trial(name: str, plan: Plan) -> Candidate:
            return replace(self.tried(plan), selector=name)

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
            weaker = {
                f"{least.selector}, {name}": replace(plan, repair=None if repair is None else to_json(repair))
                for name, repair in WEAKER.items()
                if repair is not None or not plan.branches  # a branch that goes needs one
            }
            done += self._each("candidates", weaker, whole, others=done)
            plans |= weaker
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
        """Do some work for every plan, or for a number of them; a plan that fails drops out while another is left.

        Args:
            stage: Name of the stage, for the progress.
            plans: Plans by name.
            work: Function that makes the candidate of a plan.
            wanted: Number of candidates; None is all.
            others: Candidates that exist already, and are left where all of these fail.
        """
        done: list[Candidate] = []
        failures: list[Exception] = []
        wanted = len(plans) if wanted is None else min(wanted, len(plans))
        with self.progress(stage, wanted) as advance:
            for name, plan in plans.items():
                if len(done) == wanted:
                    break
                try:
                    done.append(work(name, plan))
                except WRONG as cause:
                    if (len(plans) == 1 and not others) or world().size > 1:
                        raise
                    failures.append(cause)
                    self.notes.append(f"candidate {name} was dropped: {cause}")
                    continue
                advance()
        if not done and not others:
            raise failures[0]
        return done


def part_of(batches: Iterable[Batch], samples: int, *, held_out: int, processes: int) -> list[Batch] | None:
    """A part of the samples to try many plans on, or None where they are too few for that.

    Args:
        batches: Batches of all samples.
        samples: Number of samples that are fitted on.
        held_out: Number of samples of which one is held out.
        processes: Number of processes that share the batches; each needs one, so batches are cut where they are too
            few.
    """
    every = min(SPARSEST, samples // FEWEST)
    if every < 2:
        return None
    part = merged(Part(batches, every, held_out), LARGEST_BATCH)
    if len(part) < processes:
        size = max(1, sum(batch_size(batch) for batch in part) // processes)
        part = [piece for piece, _ in micro_batches(iter(part), size)]
    return part

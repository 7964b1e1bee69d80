"""The whole compression in one call: a trained network and a budget in, a smaller network out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from rankfold.allocation import Budget, Selector
from rankfold.allocation.measuring import check_families, default_families, needed
from rankfold.applying import decided_sites, held_out_in, with_those_of
from rankfold.checks import check_flag
from rankfold.data.batches import batch_size, take
from rankfold.data.draws import check_seed
from rankfold.data.splits import as_batches, digest, no_batch
from rankfold.decompositions import Family
from rankfold.distributed import together
from rankfold.errors import DataError, OptionError, PlanError, shown
from rankfold.forecasting.forecast import Forecast
from rankfold.graph.spill import Memory, parse_memory
from rankfold.install.checks import check_plan, split_by
from rankfold.options import Options, settled_budget
from rankfold.outputs.taken import Outputs, check_outputs, outputs_from_json
from rankfold.plan import Plan
from rankfold.plan.making import check_kinds
from rankfold.plan.reading import budget_of
from rankfold.progress import Progress, Told, as_progress, silent
from rankfold.repair import Lockstep
from rankfold.report.compressed import Compressed
from rankfold.report.data import Report
from rankfold.session import Session
from rankfold.sites.finding import check_selection
from rankfold.sites.models import check_module
from rankfold.sites.site import Skip
from rankfold.statistics.collect import check_positions
from rankfold.statistics.size import check_fits

__all__ = ["Compressed", "compress", "execute"]
DEFAULT_REPAIR = Lockstep()
POSITIONS = 64  # positions of each sample, for the statistics
ENOUGH = 24  # positions for each feature of a site: with many samples, fewer of each sample are enough


@overload
def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget | None = ...,
    families: Sequence[Family] | None = ...,
    repair: Lockstep | None = ...,
    selector: Selector | None = ...,
    weighting: bool = ...,
    outputs: Outputs = ...,
    only: Sequence[str] | None = ...,
    exclude: Sequence[str] = ...,
    positions: int | None = ...,
    seed: int = ...,
    work_dir: str | Path | None = ...,
    memory: Memory = ...,
    progress: Progress | Told = ...,
    dry_run: Literal[False] = ...,
) -> Compressed: ...


@overload
def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget | None = ...,
    dry_run: Literal[True],
    families: Sequence[Family] | None = ...,
    repair: Lockstep | None = ...,
    selector: Selector | None = ...,
    weighting: bool = ...,
    outputs: Outputs = ...,
    only: Sequence[str] | None = ...,
    exclude: Sequence[str] = ...,
    positions: int | None = ...,
    seed: int = ...,
    work_dir: str | Path | None = ...,
    memory: Memory = ...,
    progress: Progress | Told = ...,
) -> Forecast: ...


def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget | None = None,
    families: Sequence[Family] | None = None,
    repair: Lockstep | None = DEFAULT_REPAIR,
    selector: Selector | None = None,
    weighting: bool = True,
    outputs: Outputs = None,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    positions: int | None = POSITIONS,
    seed: int = 0,
    work_dir: str | Path | None = None,
    memory: Memory = None,
    progress: Progress | Told = silent,
    dry_run: bool = False,
) -> Compressed | Forecast:
    """Compress a trained network under one budget, without training it.

    One in ten calibration samples is held out and never fitted on, more where they are few: one in five of 250.
    Without a selector several plans are made: ranks by `Lagrangian()` and `HalfWay()`, channels removed,
    channels for half of the way and ranks for the rest, and both weighed by `Ledger()` (of channels alone: sizes by
    four rules). All are tried on one sample in eight (64 at least), and the best three are carried out on all; the one
    whose outputs on the held-out samples are closest to the original's is returned. With fewer than 128 samples to fit
    on, too few are held out to choose among so many: then five of the plans are made, and all carried out.

    Where torch.distributed is initialised with several processes, all of them call `compress` with the same arguments:
    each runs its share of the data, and all return the same plan and weights, those of one process up to rounding. A
    process that fails ends the others.

    Args:
        model: The trained network; left untouched, its training mode too. Of a compiled one the plain model inside is
            compressed, and the result is not compiled. An `nn.MultiheadAttention` in it is split into linear layers in
            the result, if that changes nothing the model computes; the plan names it.
        data: Calibration inputs, a re-iterable of batches (tensor, tuple whose first item is the input, or dict of
            keyword arguments). Labels are not needed.
        budget: Upper bounds on the size of the whole model. It may be left out with a selector that ignores it:
            `EVBMF(weaken=…)`, `ErrorBound`, `Fixed`.
        families: Methods to choose from, site by site. None is low rank, spatial, Tucker-2 and the removal of channels;
            where a selector is given, those of them whose sizes it chooses.
        repair: Method by which sites are re-solved at apply time; None leaves the factors as decomposed.
        selector: Method that alone chooses ranks, or how many channels stay (`RemovalGreedy`, `SameShare`,
            `InterpolativeGreedy`). With a selector of ranks and families that remove channels, its ranks, channels, and
            both together are still tried. None tries several plans, as above.
        weighting: True to weigh errors by their effect on the network's outputs (two backward passes over 256 samples).
        outputs: Kinds of the outputs: `Logits()`, `Values()` or `Embedding()`, or a dict of these by name of the
            output, such as `{"cls": Logits(), "boxes[0]": Values(), "pooler_output": None}` (None leaves one out). The
            kind defines which changes of an output count, in the weighting, in the choice between candidates and in the
            report. None guesses, and the report names the guess: logits are outputs of that name, and rows of scores
            that do not shift together; most others are values. Every floating tensor of a nested output counts, but for
            caches and other auxiliary entries, which the report names.
        only: Paths or patterns of the sites to compress; None is all.
        exclude: Paths or patterns of sites to leave alone.
        positions: Maximum number of positions of each sample (pixels of a feature map, tokens) to look at for the
            statistics, drawn by the seed; None is all. Fewer are drawn where a list of batches has many samples, since
            24 positions for each feature of a site are enough (16,384 at least). On the ResNets we measured, a few
            dozen gave the accuracy of all of them at a fraction of the cost.
        seed: Seed of everything that is drawn; the same seed gives the same bits on one machine.
        work_dir: A directory that keeps finished statistics, gradients, curves, trials and solved layers. A run that
            was killed and is started again with the same arguments goes on from there and gives the same bits; another
            budget or repair, or a selector where `families` are named, takes over what does not depend on it.
        memory: Maximum number of bytes that activations and moments may take, as an int or a text such as "512MB" (1 MB
            is 2²⁰ bytes). Half of them are for the values that the repair carries from layer to layer; values beyond
            that go to nameless temporary files, which changes no bit of the result. The other half (64 MB at least) is
            for Grams and other moments: the widest layers are left alone until those of all others fit, and the report
            names them. None is no limit for values; for moments it is half of the machine's memory, and layers are left
            alone whose Gram would take more than 1 GB, or more than 256 MB and more than 512 times their weight.
        progress: Callback for every step of every stage: `progress_bar()` as a context, or a function
            `f(stage, done, total)`.
        dry_run: True to only predict the cost of the compression and the sizes it can reach, from a few forward passes
            of one batch.

    Returns:
        The compressed model, the plan and the report; with `dry_run` a `Forecast`, and `work_dir` is not touched.

    Raises:
        ModelError, DataError, NumericsError, SiteError, OptionError: Bad input; nothing has been changed.
        BudgetError: The budget cannot be met; the smallest reachable value is named, and what blocks it. Or it bounds
            MACs that cannot be counted; or the compressed model exceeds it when counted.
        MemoryLimitError: The moments of no layer fit into `memory`, or an allocation failed; its purpose is named.
        WorkDirError: `work_dir` is of another model, other data or other options; what differs is named.
        DistributedError: Another process failed or is gone, or was given other arguments.
    """
    _check_call(budget, selector, dry_run)
    session = prepare(
        model,
        data,
        families=families,
        repair=repair,
        selector=selector,
        weighting=weighting,
        outputs=outputs,
        only=only,
        exclude=exclude,
        positions=positions,
        seed=seed,
        work_dir=work_dir,
        memory=memory,
        progress=progress,
    )
    return session.forecast(budget) if dry_run else session.run(budget)


@together
def prepare(
    model: nn.Module,
    data: Any,
    *,
    families: Sequence[Family] | None = None,
    repair: Lockstep | None = DEFAULT_REPAIR,
    selector: Selector | None = None,
    weighting: bool = True,
    outputs: Outputs = None,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    positions: int | None = POSITIONS,
    seed: int = 0,
    work_dir: str | Path | None = None,
    memory: Memory = None,
    progress: Progress | Told = silent,
) -> Session:
    """Analyse a network once, to compress it to several budgets.

    `prepare(model, data, …).run(budget)` is `compress(model, data, budget=budget, …)`, bit for bit; another `run`
    takes over statistics, gradients and curves. The model and the data must not be changed in between.

    Args:
        model: The trained network, as for `compress`.
        data: Calibration inputs, as for `compress`, and so are all options.

    Returns:
        The session. `run(budget)` compresses, `forecast(budget)` predicts.

    Raises:
        RankfoldError: The same errors as `compress`.
    """
    if repair is not None and not isinstance(repair, Lockstep):
        raise OptionError(
            "repair", law="an instance of Lockstep, or None", got=repr(repair), cure="try rankfold.Lockstep()"
        )
    if selector is not None:
        check_kinds({"selector": (selector, Selector)})
    check_flag("weighting", weighting)
    check_outputs(outputs)
    if work_dir is not None and not isinstance(work_dir, (str, os.PathLike)):
        raise OptionError("work_dir", law="the path of a directory, or None", got=shown(work_dir), cure="pass a path")
    if families is None:
        families = default_families(selector)
    check_families(families)
    _check_selector(selector, families)
    check_selection(only, exclude)
    check_positions(positions)
    check_seed(seed)
    limit = parse_memory(memory)
    session = Session.start(model, data, as_progress(progress), only=only, exclude=exclude, limit=limit)
    _check_number(data)
    return session.opened(
        Options(tuple(families), repair, selector, weighting, outputs, positions, seed, work_dir, limit)
    )


@together
def _check_call(budget: object, selector: object, dry_run: object) -> None:
    """Refuse wrong values of the arguments that `prepare` does not take, before any work is done."""
    settled_budget(budget, selector)
    check_flag("dry_run", dry_run)


@together
def execute(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    outputs: Outputs = None,
    memory: Memory = None,
    progress: Progress | Told = silent,
) -> Compressed:
    """Carry out a plan that is there already, and report on it as `compress` does.

    A plan that was not edited gives, on the same data, the very weights of the compression that made it.

    Args:
        model: The original; left untouched.
        data: Calibration inputs.
        plan: The plan, edited or not; its `seed` and `calibration` define how statistics are collected.
        outputs: Kinds of the outputs; None is those that the plan was made for.
        memory: Maximum number of bytes, as for `compress`, but no layer of the plan is left alone: a plan whose moments
            do not fit is refused.
        progress: Callback for every step.

    Returns:
        The same as `compress`; the plan's calibration is that of `data`. The report notes each bound of the plan's own
        budget that an edited plan no longer meets.

    Raises:
        ModelError, DataError, OptionError: Bad input, as for `compress`.
        PlanError: `plan` is no plan, or does not fit the model.
        SiteError: The plan decides on a layer that is no site.
        MemoryLimitError: The moments of the plan's layers do not fit into `memory`, or an allocation failed.
    """
    plain = check_module(model)
    if not isinstance(plan, Plan):
        raise PlanError("plan", law="an instance of Plan", got=shown(plan), cure="read a file with rankfold.Plan.load")
    progress = as_progress(progress)
    budget = budget_of(plan.budget, "plan")
    check_outputs(outputs)
    if outputs is None:
        outputs = outputs_from_json(plan.calibration.get("outputs"), "plan.calibration.outputs")
    check_plan(split_by(plain, plan), plan)
    limit = parse_memory(memory)
    session = Session.start(model, data, progress, limit=limit, every=held_out_in(plan), split=plan.split)
    _check_number(data)
    session.sites = with_those_of(session.sites, plan)
    decided = decided_sites(session.sites, plan)
    left = tuple(Skip(site.path, "not in the plan") for site in session.sites if site not in decided)
    session.sites = replace(session.sites, sites=decided, skips=(*session.sites.skips, *left))
    session.notes.append("a given plan was carried out")
    if plan.repair is not None and session.sites.graph.program is None:
        plan = replace(plan, repair=None)
    calibration = plan.calibration
    names = needed(
        [decision.method for decision in plan.changes if decision.method is not None], channels=bool(plan.cuts)
    )
    check_fits(session.sites, names, repaired=plan.repair is not None, limit=None if limit is None else limit // 2)
    session.collect(
        names,
        positions=calibration.get("positions", POSITIONS),
        enough=calibration.get("enough"),
        seed=plan.seed,
        gradient_samples=calibration.get("gradient_samples"),
        outputs=outputs,
    )
    if calibration.get("sha256", session.stats.manifest["sha256"]) != session.stats.manifest["sha256"]:
        session.notes.append("the calibration data is not the one that the plan was made with")
    done = session.finish(session.trials.attempt(replace(plan, calibration=session.stats.manifest)))
    return done if budget is None else replace(done, report=_held_to(done.report, budget))


def _check_number(data: Any) -> None:
    """Refuse a single sample, and many that are all the same: a network of rank 1 reproduces one.

    Raises:
        DataError: There is one distinct sample, or none.
    """
    seen, first = 0, b""
    for batch in as_batches(data):
        for row in range(batch_size(batch)):
            own = digest(take(batch, torch.tensor([row])))
            if seen and own != first:
                return
            seen, first = seen + 1, own
    if not seen:
        raise no_batch()
    raise DataError(
        "data",
        law="several calibration samples: a network of rank 1 reproduces the outputs of a single one",
        got="1 sample" if seen == 1 else f"{seen} samples that are all the same",
        cure="pass some hundred inputs like those the network is for",
    )


def _held_to(report: Report, budget: Budget) -> Report:
    """The report, with a note for each bound of the plan's own budget that the compressed model exceeds."""
    got, asked = report.after.amounts(), budget.to_json()
    over = tuple(
        f"the plan's own budget is not met: {name} at most {bound} (asked: {shown(asked[name])}), got {got[name]}"
        for name, bound in budget.bounds(report.before).items()
        if got[name] > bound
    )
    return replace(report, notes=(*report.notes, *over))


def _check_selector(selector: Selector | None, families: Sequence[Family]) -> None:
    """Refuse a selector that has nothing to choose, or leaves something unchosen.

    Raises:
        OptionError: The selector and the families do not fit together.
    """
    if selector is None:
        return
    if "ranks" in selector.reads:
        raise OptionError(
            "selector",
            law="a selector of channels alone, or of ranks",
            got=f"{selector!r}, which weighs one against the other",
            cure="leave it out: its plans are among those that are tried",
        )
    mine = [method for method in families if method.sized_by == selector.chooses]
    if selector.chooses == "widths" and len(mine) < len(families):
        law = "a selector that chooses how many channels stay needs families that remove channels, and no other"
        cure = "pass families=[rankfold.Interpolative()], or another selector"
    elif not mine:
        law = "a selector that chooses ranks needs a family that has some"
        cure = "leave the selector out, or pass one that chooses how many channels stay, such as RemovalGreedy()"
    else:
        return
    got = f"{selector!r} with {', '.join(type(method).__name__ for method in families)}"
    raise OptionError("selector", law=law, got=got, cure=cure)

"""Model + plan + data → compressed model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rankfold.allocation.measuring import needed
from rankfold.branches.installing import below, install_stands_
from rankfold.channels.narrowing import fold_and_cut_
from rankfold.checks import is_whole
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import HELD_OUT, Split, as_batches, first_of
from rankfold.distributed import ALONE, World
from rankfold.errors import DataError, PlanError, SiteError, is_out_of_memory, shown
from rankfold.graph.spill import Spill
from rankfold.install.checks import check_plan, split_by
from rankfold.install.fill import Fill, filler, install_shells
from rankfold.install.swap import take_over, undone_on_failure
from rankfold.layers import swap
from rankfold.layers.tied import heads_of
from rankfold.outputs.taken import outputs_from_json
from rankfold.plan import Decision, Plan
from rankfold.progress import Progress, silent
from rankfold.registry import from_json
from rankfold.repair import Lockstep
from rankfold.repair.batch_norm import reestimate_batch_norms
from rankfold.repair.lockstep import Repaired, install, lockstep_pass, self_check
from rankfold.repair.site import Recall, always_solve
from rankfold.sites.copies import check_copy, copied
from rankfold.sites.finding import sites_in
from rankfold.sites.models import check_in_place, check_model
from rankfold.sites.site import Site, Sites
from rankfold.statistics import Statistics
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import collect_gradients


def apply(
    model: nn.Module,
    plan: Plan,
    data: Any = None,
    *,
    stats: Statistics | None = None,
) -> nn.Module:
    """Carry a plan out on a copy of the model.

    Args:
        model: The original; left untouched.
        plan: Plan from `make_plan`, or read from a file, edited or not.
        data: Calibration data; needed where a method of the plan reads statistics and `stats` is None.
        stats: Statistics already collected on this model.

    Returns:
        The compressed model: the original's modules, with a plain `nn.Sequential` of `nn` layers, or a `PivotedLayer`
        of them, at the decided sites, and linear layers for the attention that the plan splits. dtype, device, training
        mode and `requires_grad` are kept, no storage is shared.

    Raises:
        PlanError: The plan does not fit the model.
        DataError: Statistics are needed and there is no data.
    """
    model = split_by(check_model(model), plan)
    return _apply(model, copied(model), plan, data, stats)


def apply_(
    model: nn.Module,
    plan: Plan,
    data: Any = None,
    *,
    stats: Statistics | None = None,
) -> nn.Module:
    """`apply` in place. Everything is checked and solved site by site; a failed check leaves the model untouched.

    Parameters that the plan does not change are the same objects afterwards, but for those of attention that it splits.

    Returns:
        The root: the same object, or a new module where the model itself is the one layer.

    Raises:
        ModelError: The model is compiled; its code may hold on to the layers that are replaced.
    """
    check_in_place(model, instead="rankfold.apply")
    model = check_model(model)
    with undone_on_failure(model):
        model = split_by(model, plan, inplace=True)
        return _apply(model, model, plan, data, stats)


@dataclass(frozen=True, eq=False)
class Carried:
    """A plan that was carried out.

    Attributes:
        model: Root of the changed model.
        details: Remarks on the repair, for the report.
        errors: Errors of the sites that a repair solved, on held-out samples, (without it, as installed), by path.
    """

    model: nn.Module
    details: tuple[str, ...] = ()
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def carry_out(
    model: nn.Module,
    target: nn.Module,
    plan: Plan,
    *,
    sites: Sites,
    stats: Statistics | None,
    batches: Iterable[Batch],
    spill: Spill | None = None,
    recall: Callable[[nn.Module], Recall] = lambda _: always_solve,
    progress: Progress = silent,
    world: World = ALONE,
    drawn_for: int | None = None,
) -> Carried:
    """Carry a plan out on a model whose sites were found already: with a repair where the plan names one.

    Args:
        model: The original.
        target: Model that is changed: a copy of the original, or the original itself.
        plan: The plan.
        sites: Sites of the original.
        stats: Statistics that the plan's methods read.
        batches: Calibration inputs, read where the plan names a repair.
        spill: Store of the values of a repair; None keeps them in memory, without a limit.
        recall: Function of the model whose layers are solved anew (the narrowed one, where the plan cuts channels);
            it returns the function by which a repair solves a site, or finds it solved.
        progress: Callback for every site.
        world: The processes that share the calibration inputs and the sites.
        drawn_for: Number of samples that the positions of one sample are drawn for, as for `lockstep_pass`.

    Returns:
        The changed model, with remarks on the repair and its errors.

    Raises:
        SelfCheckError: The module handed back does not compute what the repair computed.
    """
    check_plan(model, plan)
    base, shells = None, plan
    sites = replace(sites, sites=tuple(site for site in sites if not below(site.path, plan.stands)))
    if plan.stands:
        base, shells = install_stands_(target, plan.stands), replace(plan, stands={}, branches=())
    if plan.cuts:
        norms: dict[str, str | None] | None = None
        if any(decision.fold for decision in plan.channels):
            norms = {}
            if plan.repair is None and sites.graph.program is not None:  # a repair finds the norms' shifts itself
                norms = {call.path: call.norm for call in sites.in_graph()}
        stats = fold_and_cut_(target, model, sites, plan.cuts, stats, norms, plan.attributes)
        base, shells = target, replace(shells, cuts={}, attributes={}, channels=())
    if base is not None:
        _check_runs(base, first_of(batches), sites)
    if plan.repair is None:
        return Carried(install_shells(target, shells, shared_out(filler(stats, heads_of(target)), world)))
    options = from_json(dict(plan.repair), Lockstep, place="plan.repair")
    repaired = lockstep_pass(
        model,
        sites,
        plan,
        list(batches),
        options=options,
        stats=stats,
        every=held_out_in(plan),
        spill=spill,
        recall=recall(model if base is None else base),
        progress=progress,
        world=world,
        base=base,
        drawn_for=drawn_for,
    )
    old = {path: module for path, module in target.named_modules(remove_duplicate=False) if path in repaired.layers}
    moments = {name: buffer.clone() for name, buffer in target.named_buffers() if name in repaired.buffers}
    result = target
    try:
        result = install(target, repaired)
        fitted = Split(batches, held_out_in(plan), held_out=False)
        remarks = _checked(result, repaired, options, fitted, world)
    except BaseException:  # a model that is changed in place is left as it was, also by Ctrl-C
        back = swap(result, {id(new): old[path] for path, new in repaired.layers.items()})
        for name, value in moments.items():
            back.get_buffer(name).copy_(value)
        raise
    return Carried(result, tuple(remarks), repaired.errors)


def _check_runs(narrow: nn.Module, example: Batch, sites: Sites) -> None:
    """Refuse cuts, or removed branches, that leave a model which does not run.

    Args:
        narrow: The model as they leave it.
        example: A batch.
        sites: Sites of the original.

    Raises:
        PlanError: The model does not run; its error is named.
    """
    if sites.graph.any_batch:
        size = batch_size(example)
        example = take(example, torch.arange(sites.graph.at_once(size)))
    try:
        with evaluating(narrow):
            run(narrow, to_device(example, device_of(narrow)))
    except RuntimeError as cause:
        if is_out_of_memory(cause):
            raise
        raise PlanError(
            "plan",
            law="the model runs as the cuts leave it, and without the branches that go",
            got=f"{type(cause).__name__}: {str(cause).splitlines()[0]}",
            cure="make the plan again",
        ) from cause


def _checked(
    result: nn.Module, repaired: Repaired, options: Lockstep, fitted: Iterable[Batch], world: World
) -> list[str]:
    """Check a changed model against the walk, re-estimate batch norms if asked, and return remarks on both."""
    worst = self_check(result, repaired, world)
    remarks = [f"self-check: the module equals the engine within {worst:.1e}"]
    if repaired.unrepaired:
        named, more = ", ".join(repaired.unrepaired[:5]), len(repaired.unrepaired) - 5
        remarks.append(
            f"repair did not clearly lower the held-out error and was not used at: {named}"
            + (f" and {more} more" * (more > 0))
        )
    if options.reestimate_batch_norms:
        norms = reestimate_batch_norms(result, fitted, world=world)
        remarks.append(f"running moments of {len(norms)} batch norms were estimated anew, as asked")
    return remarks


def held_out_in(plan: Plan) -> int:
    """Number of samples of which one was held out when the plan was made; 10 in plans that do not record it."""
    every = plan.calibration.get("held_out", HELD_OUT)
    if not is_whole(every) or every < 2:
        raise PlanError(
            "plan.calibration.held_out", law="an int of at least 2", got=shown(every), cure="take it out, or make it 10"
        )
    return every


def with_those_of(sites: Sites, plan: Plan) -> Sites:
    """The sites, with the fixed ones where the plan decides on one: such a plan may remove channels of them."""
    fixed = {site.path for site in sites.fixed}
    return sites.with_fixed() if any(decision.site in fixed for decision in plan.decisions) else sites


def decided_sites(sites: Sites, plan: Plan) -> tuple[Site, ...]:
    """The sites that a plan decides on, in its order.

    Raises:
        SiteError: The plan decides on a layer that is no site, or factorises one whose place no other module can take.
    """
    found = tuple(sites.at(decision.site) for decision in plan.decisions)
    for site, decision in zip(found, plan.decisions, strict=True):
        if site.fixed and decision.method is not None:
            raise SiteError(
                repr(site.path),
                law="the path of a site",
                got=f"a layer that can only lose channels ({site.fixed})",
                cure="make the decision dense",
            )
    return found


def shared_out(fill: Fill, world: World) -> Fill:
    """A fill in which the processes take turns, and send each other the shells that they filled."""
    if world.size == 1:
        return fill
    number = itertools.count()

    def shared(decision: Decision, layer: nn.Module, shell: nn.Module) -> None:
        turn = next(number)
        if world.owns(turn):
            fill(decision, layer, shell)
        world.broadcast_([*shell.parameters(), *shell.buffers()], turn)

    return shared


def _collected(model: nn.Module, batches: Iterable[Batch], sites: Sites, names: list[str], plan: Plan) -> Statistics:
    """Statistics collected as `compress` collected them, by the manifest in the plan."""
    fit = Split(batches, held_out_in(plan), held_out=False)
    positions = plan.calibration.get("positions")
    enough = plan.calibration.get("enough")
    stats = collect(model, fit, sites=sites, statistics=names, positions=positions, enough=enough, seed=plan.seed)
    if "gradient_samples" in plan.calibration:
        outputs = outputs_from_json(plan.calibration.get("outputs"), "plan.calibration.outputs")
        samples = plan.calibration["gradient_samples"]
        collect_gradients(model, fit, stats, sites=sites, samples=samples, outputs=outputs, seed=plan.seed)
    return stats


def _apply(model: nn.Module, target: nn.Module, plan: Plan, data: Any, stats: Statistics | None) -> nn.Module:
    """Check the plan, collect the statistics that it reads where none are given, and carry it out."""
    check_plan(model, plan)
    if stats is not None and not isinstance(stats, Statistics):
        raise DataError("stats", law="a rankfold.Statistics, or None", got=shown(stats), cure="pass what collect gave")
    methods = [decision.method for decision in plan.changes if decision.method is not None]
    names = needed(methods, channels=bool(plan.cuts))
    reads = sorted({*names, *(name for method in methods for name in method.needs)}) if stats is None else []
    if plan.repair is not None or plan.cuts:
        reads = [f"the calibration inputs ({'removal of channels' if plan.repair is None else 'repair'})"]
    if not reads:
        return install_shells(target, plan, filler(stats, heads_of(target)))
    if data is None:
        raise DataError(
            "data",
            law=f"the plan reads {', '.join(reads)}",
            got="neither data nor stats" if stats is None else "no data",
            cure="pass the calibration data",
        )
    batches = as_batches(data)
    found = sites_in(model, first_of(batches), split=plan.split)[1]
    if target is not model:
        check_copy(model, first_of(batches))
    found = with_those_of(found, plan)
    decided = replace(found, sites=decided_sites(found, plan))
    if stats is None:
        stats = _collected(model, batches, decided, names, plan)
    smaller = plan.cuts or plan.stands
    if smaller and target is model:  # it is solved against the original, so that is needed to the end
        carried = carry_out(model, copied(model), plan, sites=decided, stats=stats, batches=batches)
        return take_over(model, carried.model, plan)
    return carry_out(model, target, plan, sites=decided, stats=stats, batches=batches).model

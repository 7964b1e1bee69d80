"""Lockstep repair: one walk over the network, solving site after site on what the compressed network feeds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.channels.narrowing import kept_of
from rankfold.comparison.misfit import Misfit, misfit
from rankfold.data.batches import Batch, batch_size, micro_batches, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.distributed import ALONE, World
from rankfold.errors import DistributedError, NumericsError, SelfCheckError, TraceError
from rankfold.graph.spill import Spill
from rankfold.graph.trace import followed_output
from rankfold.graph.walk import Arrival, Returned, Walk, weights_of
from rankfold.install.swap import train_as_
from rankfold.layers import swap
from rankfold.layers.stands import Always, Constant
from rankfold.plan import Plan
from rankfold.plan.repair import Lockstep
from rankfold.progress import Progress, silent
from rankfold.repair.gather import Share
from rankfold.repair.removed import Removed
from rankfold.repair.site import Recall, SiteSolver, Solved, always_solve
from rankfold.repair.widened import Widened
from rankfold.sites.site import Sites
from rankfold.statistics import Statistics


@dataclass(eq=False)
class Repaired:
    """The result of a lockstep pass.

    Attributes:
        layers: New layer of every site that changes, by path.
        buffers: Changed running means of batch norms, by name.
        errors: Relative error of every solved site on held-out samples, (without repair, as returned), by path.
        unrepaired: Sites whose repair did not make the held-out error clearly smaller; they keep the unrepaired layer.
        parts: The micro-batches walked.
        held: Masks, one for each of these micro-batches, shape (samples,): True for samples that are held out.
        outputs: Outputs of both networks, computed for one micro-batch when it is read; None before the walk.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    unrepaired: list[str] = field(default_factory=list)
    parts: list[Batch] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    outputs: Returned | None = None


def lockstep_pass(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    options: Lockstep,
    stats: Statistics | None,
    every: int,
    spill: Spill | None = None,
    recall: Recall = always_solve,
    progress: Progress = silent,
    world: World = ALONE,
    base: nn.Module | None = None,
    drawn_for: int | None = None,
) -> Repaired:
    """One lockstep pass over the whole network: about two forward passes, plus the moments and solves.

    Args:
        model: The original; not changed.
        sites: Sites of the original, with a graph.
        plan: Plan with the decision of each site.
        batches: The calibration set.
        options: The repair's options.
        stats: Statistics of the original, for the unrepaired layers and the output weighting.
        every: Number of samples of which one is held out, that is, never fitted on.
        spill: Store of the values of the walk; None keeps them in memory, without a limit.
        recall: Function that solves a site, or returns a solution that exists already.
        progress: Callback for every site.
        world: The processes that share the micro-batches and solve in turns; all get the same layers.
        base: The narrowed original, with folded layers, where the plan cuts channels; `stats` are then of it.
        drawn_for: Number of samples that the positions of one sample are drawn for; None is as many as there are.

    Returns:
        The new layers and buffers, ready to be installed.

    Raises:
        TraceError: There is no graph to walk, or a layer to be changed is not found in it.
        DistributedError: There are fewer micro-batches than processes.
    """
    program = sites.graph.program
    if program is None:
        raise TraceError(
            sites.model,
            law="lockstep repair walks the traced graph",
            got=sites.graph.reason or "no graph",
            cure="pass repair=None",
        )
    device = device_of(model)
    size = sites.graph.at_once(options.batch) if sites.graph.static_batch is None else sites.graph.static_batch
    result = Repaired()
    numbers: list[int] = []
    starts: list[int] = []
    samples = judging = number = 0
    for number, (part, rows) in enumerate(micro_batches(iter(batches), size), start=1):
        samples += len(rows)
        judging += sum(row % every == every - 1 for row in rows)
        if sites.graph.static_batch is not None and len(rows) != size:
            raise TraceError(
                sites.model,
                law=f"the size of every batch is a multiple of {size}, which the traced graph holds fixed",
                got=f"a batch that leaves {len(rows)} samples for micro-batch {number}",
                cure=f"give batches of {size} samples and leave a smaller last one out, or pass repair=None",
            )
        if world.owns(number - 1):
            numbers.append(number - 1)
            starts.append(rows.start)
            result.parts.append(to_device(part, device))
            result.held.append(torch.tensor([row % every == every - 1 for row in rows]))
    if number < world.size:
        raise DistributedError(
            "data",
            law=f"at least as many micro-batches (of at most {size} samples) as processes",
            got=f"{number} for {world.size} processes",
            cure="pass more data or a smaller Lockstep(batch=...), or start fewer processes",
        )
    removed = Removed.of(program, model, plan)
    calls = [call for call in sites.in_graph() if call.exit not in removed.dead]
    reached = {call.path for call in calls}
    missed = [decision.site for decision in plan.changes if decision.site not in reached]
    if missed:
        raise TraceError(
            repr(missed[0]),
            law="every layer that the plan changes is called in the traced graph",
            got="no call that lockstep repair knows",
            cure="pass repair=None, or exclude the layer; please report it",
        )
    originals = dict(model.named_modules(remove_duplicate=False))
    modules = originals if base is None else dict(base.named_modules(remove_duplicate=False))
    kept = {call.path: kept_of(call.path, originals[call.path], plan.cuts) for call in calls}
    share = Share(
        result.parts, result.held, numbers, starts, samples if drawn_for is None else drawn_for, judging, world
    )
    alone = {part.path: part.rows for site in sites for part in site.parts}
    solver = SiteSolver(modules, plan, options, stats, share, kept, alone)
    heads = {site.path: site.head.path for site in sites if site.head is not None}
    tables = {head: table for table, head in heads.items()}
    several = {path for path, times in Counter(call.path for call in calls).items() if times > 1}
    if ahead := several - {*heads, *tables}:
        solver.targets.look_ahead(model, ahead)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    overrides: dict[str, Tensor] = {}  # buffers of the walk, which is as wide as the original
    with progress("lockstep", len({call.path for call in [*calls, *removed.calls]})) as advance, evaluating(model):

        @cache
        def table(path: str) -> Solved:
            return recall(path, lambda: solver.table(path, heads[path]))

        def solve(arrival: Arrival) -> nn.Module:
            path = arrival.call.path
            if arrival.call in removed.calls:
                constant = removed.constant(arrival, share, alone.get(path, ()))
                if (place := removed.places[path]) and isinstance(new := modules[place], Constant):
                    left = plan.cuts.get(f"{place}.bias", {}).get(0)
                    flat = constant.reshape(-1)
                    result.layers[place] = new.of(flat if left is None else flat[list(left)])
                advance()
                return Always(constant)
            if path in heads:
                solved = table(path)
            elif path in tables:  # holds the table's parameter itself, which a solution on disk does not
                solved = solver.head(arrival, tables[path], table(tables[path]).layer, alone=path not in several)
            else:
                solved = recall(path, lambda: solver.solve(arrival))
            if solved.layer is not modules[path]:
                result.layers[path] = solved.layer
            if solved.errors is not None:
                result.errors[path] = solved.errors
                if not solved.repaired:
                    result.unrepaired.append(path)
            result.buffers.update(solved.buffers)
            stays = kept[path].outputs
            for name, value in solved.buffers.items():
                overrides[name] = value if stays is None else buffers[name].index_copy(0, stays.to(value.device), value)
            advance()
            if not kept[path]:
                return solved.layer
            return Widened(solved.layer, originals[path], kept[path])

        walked = [*calls, *removed.calls]
        result.outputs = Walk(
            program, weights_of(model), walked, result.parts, solve, overrides, spill, removed.dead
        ).run()
    return result


def install(model: nn.Module, repaired: Repaired) -> nn.Module:
    """Put the layers and buffers of a lockstep pass into a model of the original's structure; returns the root."""
    modules = dict(model.named_modules(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, value in repaired.buffers.items():
        buffers[name].copy_(value)
    replaced = {}
    for path, layer in repaired.layers.items():
        old = modules[path]
        train_as_(layer, old)
        replaced[id(old)] = layer.train(old.training)
    return swap(model, replaced)


def self_check(model: nn.Module, repaired: Repaired, world: World = ALONE) -> float:
    """Run the compressed module on held-out samples and compare with the interpreter's compressed side.

    Returns:
        The largest relative difference of an output, `‖module − interpreter‖ / ‖interpreter‖`.

    Raises:
        SelfCheckError: The difference is above 1e-4 (in half precision: above 64 steps of the dtype), one entry is off
            by more than its rounding (`local_misfit`), or the outputs differ in structure.
        NumericsError: The interpreter's outputs are not finite.
    """
    worst = 0.0
    if repaired.outputs is None:
        raise TypeError("the walk did not finish")
    judging = [number for number, held in enumerate(repaired.held) if bool(held.any())]
    for number in judging or range(len(repaired.parts)):
        part, held = repaired.parts[number], repaired.held[number]
        rows = torch.nonzero(held).flatten() if judging else torch.arange(len(held))
        original, walked = repaired.outputs[number]
        seen = _seen(model, part, rows, walked, original)
        if not seen.worst <= 1:  # a norm without running moments computes otherwise on part of a batch
            seen = _seen(model, part, torch.arange(len(held)), walked, original)
        if not seen.worst <= 1:
            raise _unequal(
                model,
                f"a relative difference of {seen.difference:.3g}, at one entry {seen.local:.3g} times its rounding",
                f"at most {seen.allowed:.3g}, and 1 time,",
            )
        worst = max(worst, seen.difference)
    largest = torch.tensor([worst], dtype=torch.float64)
    world.largest_([largest])
    return float(largest)


def _seen(model: nn.Module, part: Batch, rows: Tensor, walked: Any, before: Any) -> Misfit:
    """The first output that is wrong on some rows of a micro-batch, else the one furthest from the engine's."""
    worst = Misfit()
    samples = batch_size(part)
    expected, original = ([x for x in _pytree.tree_leaves(y) if isinstance(x, Tensor)] for y in (walked, before))
    with evaluating(model):  # run anew for each: the walk began every micro-batch with the buffers as they are
        output = followed_output(run(model, take(part, rows)))
        got = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(expected) != len(got):
        raise _unequal(model, f"{len(got)} output tensors", f"{len(expected)}")
    for mine, theirs, dense in zip(got, expected, original, strict=True):
        if not theirs.is_floating_point() or theirs.shape[:1] != (samples,):
            continue
        target = theirs[rows.to(theirs.device)]
        if target.shape != mine.shape and len(rows) < samples:
            return Misfit(float("inf"))  # no axis of samples after all: the whole micro-batch decides
        if target.shape != mine.shape:
            raise _unequal(model, f"an output of shape {tuple(mine.shape)}", f"{tuple(target.shape)}")
        if not bool(torch.isfinite(target).all()):
            raise NumericsError(
                f"output of {type(model).__name__}",
                law="every output on the calibration data is finite",
                got="NaN or infinity on a held-out sample",
                cure="look at the calibration data",
            )
        seen = misfit(mine, target, dense[rows.to(dense.device)].to(target.device))
        if not seen.worst <= 1:
            return seen
        worst = max(worst, seen, key=lambda each: each.worst)
    return worst


def _unequal(model: nn.Module, got: str, wanted: str) -> SelfCheckError:
    return SelfCheckError(
        type(model).__name__,
        law="the compressed module computes what the engine computed",
        got=f"{got} where {wanted} was computed",
        cure="exclude the layers whose code reads more than their output, such as its width; please report it",
    )

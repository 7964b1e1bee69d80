"""A plan from a file, carried out as `rankfold.compress` would have done it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankfold.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from rankfold.graph.sites import Sites
    from rankfold.pipeline import Compressed
    from rankfold.plan import Plan

POSITIONS = 64  # as in `rankfold.compress`, for a plan that does not say


def carry_out(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    positions: tuple[int | None] | None,
    seed: int | None,
    progress: Progress,
) -> Compressed:
    """Carry a plan out and report on it.

    One in ten samples is held out for the comparison, as in `rankfold.compress`; so a plan that nobody edited gives,
    on the same data, the very weights it was made for.

    Args:
        model: The original.
        plan: The plan.
        batches: Calibration data, re-iterable.
        positions: Positions a sample in a tuple of one; None takes the plan's.
        seed: Seed of what is drawn; None takes the plan's.
        progress: Told about every step.

    Returns:
        As `rankfold.compress`.

    Raises:
        PlanError, SiteError: The plan does not fit the model.
    """
    from rankfold.applying import apply
    from rankfold.curves import needed
    from rankfold.graph.sites import find_sites
    from rankfold.metrics.compare import compare
    from rankfold.metrics.counted import count
    from rankfold.metrics.latency import latency_ratio
    from rankfold.report.data import Report, environment, rows
    from rankfold.statistics.collect import collect
    from rankfold.statistics.data import HELD_OUT, Compressed, Split, as_batches
    from rankfold.surgery import check_plan

    seconds: dict[str, float] = {}
    check_plan(model, plan)
    batches = as_batches(batches)
    example = next(iter(batches))
    drawn = plan.seed if seed is None else seed
    looked_at = plan.calibration.get("positions", POSITIONS) if positions is None else positions[0]
    start = time.perf_counter()
    with progress("trace", None):
        sites = _decided(find_sites(model, example), plan)
    seconds["trace"] = time.perf_counter() - start
    fit, held_out = (Split(batches, HELD_OUT, held_out=part) for part in (False, True))
    judged: Iterable[Any] = held_out
    notes = ["a given plan was carried out"]
    if not any(True for _ in held_out):
        judged = batches
        notes.append(f"fewer than {HELD_OUT} calibration samples: compared on the samples that were fitted on")
    start = time.perf_counter()
    statistics = needed([decision.method for decision in plan.changes if decision.method is not None])
    stats = collect(model, fit, sites=sites, statistics=statistics, positions=looked_at, seed=drawn, progress=progress)
    seconds["statistics"] = time.perf_counter() - start
    if plan.calibration.get("sha256", stats.manifest["sha256"]) != stats.manifest["sha256"]:
        notes.append("the calibration data is not the one that the plan was made with")
    start = time.perf_counter()
    with progress("apply", None):
        compressed = apply(model, plan, stats=stats)
        seen = compare(model, compressed, judged)
    seconds["apply"] = time.perf_counter() - start
    with progress("latency", None):
        ratio = latency_ratio(model, compressed, example)
    done = replace(plan, seed=drawn, calibration=stats.manifest)
    report = Report(
        sites.model,
        rows(sites, plan),
        sites.cost,
        count(compressed, example),
        plan.budget,
        ratio,
        seen,
        (),
        seconds,
        tuple(notes),
        drawn,
        environment(),
    )
    return Compressed(compressed, done, report)


def _decided(found: Sites, plan: Plan) -> Sites:
    """The sites that the plan decides on, in its order; the others are left alone."""
    from rankfold.graph.sites import Skip

    sites = tuple(found.at(decision.site) for decision in plan.decisions)
    kept = {site.path for site in sites}
    rest = tuple(Skip(site.path, "not in the plan") for site in found if site.path not in kept)
    return replace(found, sites=sites, skips=(*found.skips, *rest))

"""Model + plan + data → compressed model."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankfold.curves import needed
from rankfold.errors import DataError
from rankfold.graph.sites import Sites, check_model, find_sites
from rankfold.plan import Plan
from rankfold.statistics import Statistics
from rankfold.statistics.collect import collect
from rankfold.statistics.data import as_batches
from rankfold.surgery import check_plan, copied, filler, install_shells


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
        plan: From `make_plan`, or read from a file, edited or not.
        data: Calibration data; needed where a method of the plan reads statistics and `stats` is None.
        stats: Statistics already collected on this model.

    Returns:
        The compressed model: the original's modules, with plain `nn.Sequential` of `nn` layers at the decided sites.
        dtype, device, training mode and `requires_grad` are kept, no storage is shared.

    Raises:
        PlanError: The plan does not fit the model.
        DataError: Statistics are needed and there is no data.
    """
    stats = _ready(model, plan, data, stats)
    return install_shells(copied(model), plan, filler(stats))


def apply_(
    model: nn.Module,
    plan: Plan,
    data: Any = None,
    *,
    stats: Statistics | None = None,
) -> nn.Module:
    """`apply` in place. Everything is checked and solved site by site; a failed check leaves the model untouched.

    Returns:
        The root: the same object, or a new module where the model itself is the one layer.
    """
    stats = _ready(model, plan, data, stats)
    return install_shells(model, plan, filler(stats))


def _ready(model: nn.Module, plan: Plan, data: Any, stats: Statistics | None) -> Statistics | None:
    """Check the plan, and collect what its methods read where that was not done before."""
    check_model(model)
    check_plan(model, plan)
    methods = [decision.method for decision in plan.changes if decision.method is not None]
    names = needed(methods)
    if stats is not None or not names:
        return stats
    if data is None:
        raise DataError(
            "data",
            law=f"the plan's methods read {', '.join(names)}",
            got="neither data nor stats",
            cure="pass the calibration data",
        )
    batches = as_batches(data)
    found = find_sites(model, next(iter(batches)))
    return collect(model, batches, sites=_decided(found, plan), statistics=names, seed=plan.seed)


def _decided(found: Sites, plan: Plan) -> Sites:
    """The sites that the plan changes."""
    from dataclasses import replace

    return replace(found, sites=tuple(found.at(decision.site) for decision in plan.changes))

"""Networks of many sizes from one with ordered layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.allocation import Budget, Fixed, RankSelector
from rankfold.allocation.curve import Curves, RankCurve
from rankfold.api import compress
from rankfold.checks import check_count
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.data.batches import to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import as_batches
from rankfold.decompositions import SVD
from rankfold.errors import BudgetError
from rankfold.outputs.taken import first_samples, output_tensor
from rankfold.plan.making import make_plan
from rankfold.repair.batch_norm import reestimate_batch_norms
from rankfold.report.compressed import Compressed
from rankfold.sites.finding import find_sites
from rankfold.training.ordered import merge_ordered, ordered_layers, showing

AT_ONCE = 64  # samples in one batch of the measurements
GRID = 10  # ranks of each layer at which the error is measured


def extract(
    model: nn.Module,
    data: Any,
    budget: Budget,
    *,
    samples: int = 256,
    selector: RankSelector | None = None,
    norms: bool = True,
) -> Compressed:
    """A smaller network from one with ordered layers, without training: each layer keeps its first ranks.

    Each layer alone is cut to ten of its ranks, and the change of the outputs `Σ‖y − ŷ‖² / Σ‖y‖²` is measured on a few
    samples; a selector then chooses the ranks under the budget, as it does for `compress`. Layers whose two factors
    would be larger than one are multiplied together. One training serves as many budgets as are asked for.

    Args:
        model: A model with ordered layers; untouched.
        data: A re-iterable of batches, as for `compress`; labels are not read.
        budget: Upper bounds, shares of the model with dense layers.
        samples: Number of samples on which cuts are measured.
        selector: Selector of the ranks; None is `Lagrangian()`.
        norms: True to estimate the running moments of batch norms anew on the data, since training saw all ranks.

    Returns:
        As of `compress`, whose original is the network with dense layers of the ranks that were kept, its weights being
        exactly of those ranks.

    Raises:
        SiteError: The model has no ordered layers.
        BudgetError: No ranks meet the budget, or nothing has to be made smaller for it.

    References:
        Maestro, where the rank that costs least on one batch goes, one after the other. We differ in the selector,
        which sees all layers at once.
    """
    check_count("extract.samples", samples, cure="try 256")
    layers = ordered_layers(model)
    dense = merge_ordered(model).eval()
    batches = list(first_samples(as_batches(data), samples, AT_ONCE))
    sites = find_sites(dense, batches[0])
    device, method = device_of(model), SVD()

    def outputs() -> list[Tensor]:
        with evaluating(model):
            return [output_tensor(run(model, to_device(batch, device)))[0].double() for batch in batches]

    expected = outputs()
    error = _relative(expected, outputs)
    curves = []
    for site in sites:
        if site.path not in layers:
            continue
        whole = dense_cost(site)
        whole_rank = layers[site.path].rank
        grid = sorted({max(1, round(whole_rank * step / GRID)) for step in range(1, GRID + 1)})
        ranks = [rank for rank in grid if site_cost(site, method.form, rank).params < whole.params]
        errors = []
        for rank in ranks:
            with showing(model, {site.path: rank}):
                errors.append(error())
        if ranks:
            falling = torch.tensor(errors).flip(0).cummax(0).values.flip(0).tolist()  # no larger rank is worse
            costs = tuple(site_cost(site, method.form, rank) for rank in ranks)
            curves.append(RankCurve(site, method, tuple(ranks), costs, tuple(falling)))
    plan = make_plan(Curves(sites, tuple(curves)), budget=budget, selector=selector)
    chosen = {decision.site: decision.rank for decision in plan.changes}
    if not chosen:
        raise BudgetError(
            "extract",
            law="a budget for which something has to be made smaller",
            got=str(budget),
            cure="use rankfold.training.merge_ordered for the whole network",
        )
    with showing(model, {path: rank for path, rank in chosen.items() if isinstance(rank, int)}):
        cut = merge_ordered(model).eval()
    if norms:
        reestimate_batch_norms(cut, data)
    return compress(cut, data, families=[method], selector=Fixed(chosen), repair=None, weighting=False)


def _relative(expected: list[Tensor], outputs: Callable[[], list[Tensor]]) -> Callable[[], float]:
    """The function that measures the relative change of the outputs."""
    energy = sum(float(each.square().sum()) for each in expected) or 1.0

    def error() -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(expected, outputs(), strict=True)) / energy

    return error

"""Whether a layer can be made smaller at all."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from rankfold.factors import Rank
from rankfold.layers import Geometry
from rankfold.layers.shells import forms, stages

if TYPE_CHECKING:
    from rankfold.graph.sites import Site


def has_room(site: Site) -> bool:
    """Whether some form at its smallest rank has fewer parameters, or fewer MACs, than the layer."""
    from rankfold.metrics.cost import dense_cost, site_cost

    dense = dense_cost(site)
    for form in forms():
        rank = smallest_rank(form, site.geometry)
        if rank is None or prod(part.n_weights for part in stages(site.geometry, form, rank)) == 0:
            continue
        cost = site_cost(site, form, rank)
        if cost.params < dense.params or cost.macs < dense.macs:
            return True
    return False


def smallest_rank(form: str, geometry: Geometry) -> Rank | None:
    """The smallest rank of a form, or None where the form has no case in this geometry."""
    kernel = geometry.kernel
    if form == "matrix":
        return 1
    if form == "mirrored":
        return 1 if any(size > 1 for size in kernel) else None
    if form == "spatial":
        return 1 if len(kernel) == 2 and min(kernel) > 1 else None
    if form == "tucker":
        return (1, 1) if any(size > 1 for size in kernel) else None
    return None

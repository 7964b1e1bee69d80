"""Whether a layer can be made smaller at all."""

from __future__ import annotations

from math import prod

from rankfold.cost.formula import Priced, dense_cost, site_cost
from rankfold.layers import form_of, forms, stages


def has_room(site: Priced) -> bool:
    """Whether some form at its smallest rank has fewer parameters, or fewer MACs, than the layer."""
    dense = dense_cost(site)
    for form in forms():
        rank = form_of(form).smallest(site.geometry)
        if rank is None or prod(part.n_weights for part in stages(site.geometry, form, rank)) == 0:
            continue
        cost = site_cost(site, form, rank)
        if cost.params < dense.params or cost.macs < dense.macs:
            return True
    return False

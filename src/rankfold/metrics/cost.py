"""Cost by formula: of a model, of a site, of a site at a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankfold.factors import Rank
from rankfold.layers import stages

if TYPE_CHECKING:
    from rankfold.graph.sites import Site

RESOURCES = ("params", "macs", "bytes")


@dataclass(frozen=True)
class Cost:
    """Amounts of each resource.

    Attributes:
        params: Parameters, shared ones once.
        macs: Multiply-accumulates per sample.
        bytes: Bytes of parameters and persistent buffers, shared ones once.
    """

    params: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Sum a resource at a time."""
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        """Difference a resource at a time."""
        return Cost(self.params - other.params, self.macs - other.macs, self.bytes - other.bytes)

    def amounts(self) -> dict[str, int]:
        """By name of the resource."""
        return {name: getattr(self, name) for name in RESOURCES}


def dense_cost(site: Site) -> Cost:
    """What the site costs as it is."""
    params = site.geometry.n_params
    macs = sum(count * site.geometry.macs(size) for size, count in site.calls)
    return Cost(params, macs, params * site.element_size)


def site_cost(site: Site, form: str, rank: Rank) -> Cost:
    """What the site costs in a form at a rank: parameters, and MACs of every stage at the size it runs at."""
    parts = stages(site.geometry, form, rank)
    params = sum(part.n_params for part in parts)
    macs = 0
    for size, count in site.calls:
        for part in parts:
            macs += count * part.macs(size)
            size = part.output_size(size)
    return Cost(params, macs, params * site.element_size)

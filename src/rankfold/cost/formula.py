"""Cost by formula: of a model, of a site, of a site at a rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

from rankfold.factors import Rank
from rankfold.layers import Geometry, stages

Amounts: TypeAlias = tuple[int, int]
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


@dataclass(frozen=True)
class Holding:
    """What one module has of its own, its children left out.

    Attributes:
        path: Dotted path of the module, its first.
        kind: Name of its class.
        cost: Its parameters and persistent buffers, a shared one at the module that comes first, and the MACs that its
            own code does, all calls together.
    """

    path: str
    kind: str
    cost: Cost


class Priced(Protocol):
    """What has a price: a layer, where it is called, and how large its numbers are; a `Site` is one."""

    @property
    def geometry(self) -> Geometry:
        """Shape and wiring."""

    @property
    def calls(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """For every call on one sample the spatial size of the input, and how often the layer is applied there."""

    @property
    def element_size(self) -> int:
        """Bytes of one weight element."""


def dense_cost(site: Priced) -> Cost:
    """What the site costs as it is."""
    params = site.geometry.n_params
    macs = sum(count * site.geometry.macs(size) for size, count in site.calls)
    return Cost(params, macs, params * site.element_size)


def site_cost(site: Priced, form: str, rank: Rank) -> Cost:
    """What the site costs in a form at a rank: parameters, and MACs of every stage at the size it runs at."""
    params, macs = _amounts(site.geometry, tuple(site.calls), form, rank)
    return Cost(params, macs, params * site.element_size)


@lru_cache(maxsize=2**16)  # a network repeats its layers: one table serves all that are alike
def _amounts(geometry: Geometry, calls: tuple[tuple[tuple[int, ...], int], ...], form: str, rank: Rank) -> Amounts:
    """Parameters and MACs."""
    parts = stages(geometry, form, rank)
    macs = 0
    for size, count in calls:
        for part in parts:
            macs += count * part.macs(size)
            size = part.output_size(size)
    return sum(part.n_params for part in parts), macs

"""Cost by formula: of a site as it is, and at a rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol, TypeAlias

from rankfold.cost.resources import RESOURCES, Cost
from rankfold.factors import Rank
from rankfold.layers import Geometry, form_of, stages


class Priced(Protocol):
    """What has a price: a layer, where it is called, and how large its numbers are; a `Site` is one."""

    @property
    def geometry(self) -> Geometry:
        """Shape and wiring."""

    @property
    def calls(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """Spatial size of the input, and how often the layer is applied there, for every call on one sample."""

    @property
    def element_size(self) -> int:
        """Bytes of one weight element."""

    @property
    def head(self) -> Priced | None:
        """The layer whose weight is the table of this one; None where there is none."""


Runs: TypeAlias = tuple[tuple[tuple[int, ...], int], ...]  # sizes of inputs, and how often a layer is applied there
Price: TypeAlias = Callable[[Geometry, Runs, int], int]  # price of a layer, its runs and the bytes of a number

PRICES: dict[str, Price] = {
    "params": lambda layer, runs, element: layer.n_params,
    "macs": lambda layer, runs, element: sum(count * layer.macs(size) for size, count in runs),
    "bytes": lambda layer, runs, element: layer.n_params * element,
}


def dense_cost(site: Priced) -> Cost:
    """Cost of the site as it is, with its head."""
    own = _cost((site.geometry,), site.calls, site.element_size)
    return own if site.head is None else own + dense_cost(site.head)


def site_cost(site: Priced, form: str, rank: Rank) -> Cost:
    """Cost of the site in a form at a rank: every stage at the sizes it runs at. A head is a pair whatever the form."""
    own = _at_rank(site.geometry, site.calls, site.element_size, form, rank)
    return own if site.head is None else own + site_cost(site.head, "matrix", rank)


@lru_cache(maxsize=2**16)  # a network repeats its layers: one table serves all that are alike
def _at_rank(geometry: Geometry, calls: Runs, element: int, form: str, rank: Rank) -> Cost:
    cost = _cost(stages(geometry, form, rank), calls, element)
    return cost + Cost(bytes=form_of(form).extra_bytes(geometry, rank))


def _cost(parts: tuple[Geometry, ...], runs: Runs, element: int) -> Cost:
    """Cost of layers one after the other, the first of which has some runs."""
    totals = dict.fromkeys(RESOURCES, 0)
    for part in parts:
        for name in RESOURCES:
            totals[name] += PRICES[name](part, runs, element)
        runs = tuple((part.output_size(size), count) for size, count in runs)
    return Cost(**totals)

"""Smallest size that a model can reach, and the modules that stand in the way, known without statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.proposals import FamilyForecast
from rankfold.sites.reach import NOTHING_SMALLER, Blocker, blockers
from rankfold.sites.site import Sites

SHOWN = 5  # largest number of layers that are named


@dataclass(frozen=True)
class Reach:
    """Smallest size that a model can reach.

    Attributes:
        smallest: Smallest whole-model value that plans of ranks, or of channels, reach, by resource.
        cuttable: Share of the model that lies in layers that can be cut, 0 to 1, by resource.
        blockers: Modules that these families make no smaller and that hold most of the parameters, the largest first.
    """

    smallest: dict[str, int]
    cuttable: dict[str, float]
    blockers: tuple[Blocker, ...]


def reach_of(model: nn.Module, sites: Sites, forecasts: Sequence[FamilyForecast]) -> Reach:
    """Smallest size that some families can reach on a model.

    Args:
        model: The model.
        sites: Sites of the model, with the fixed ones where channels are removed.
        forecasts: Forecasts of the families that may be used, one per kind.
    """
    total = sites.cost.amounts()
    ways = [sites.cost, *(each.smallest for each in forecasts)]
    reduced = frozenset().union(*(each.reduced for each in forecasts))
    known = {site.path for site in sites}
    cut = [dense_cost(site) for site in sites if site.path in reduced]
    cut += [_held(model, path) for path in reduced - known]
    stays = {site.path: site.fixed or NOTHING_SMALLER for site in sites if site.path not in reduced}
    part = sum(cut, Cost()).amounts()
    return Reach(
        {name: min(way.amounts()[name] for way in ways) for name in RESOURCES},
        {name: min(part[name] / max(total[name], 1), 1.0) for name in RESOURCES},
        blockers(sites, "params", most=SHOWN, frozen=stays, reduced=reduced),
    )


def _held(model: nn.Module, path: str) -> Cost:
    """Cost of a module's own parameters: their number, and their bytes."""
    own = list(model.get_submodule(path).parameters(recurse=False))
    return Cost(params=sum(p.numel() for p in own), bytes=sum(p.numel() * p.element_size() for p in own))

"""How small a model can get at all, and what stands in the way, known without statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rankfold.channels.elimination import RemovalCurve, even
from rankfold.channels.groups import ChannelGroup, find_channels
from rankfold.channels.ledger import Widths, stacks_of
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.decompositions import Decomposition, Family, Interpolative
from rankfold.sites.reach import NOTHING_SMALLER, Blocker, blockers
from rankfold.sites.site import Site, Sites

SHOWN = 5  # layers that are named at most


@dataclass(frozen=True)
class Reach:
    """How small a model can get.

    Attributes:
        smallest: By resource the smallest whole-model value that plans of ranks, or of channels, reach.
        cuttable: By resource the share of the model that lies in layers that can be cut, 0 to 1.
        blockers: Modules that these families make no smaller and that hold most of the parameters, the largest first.
    """

    smallest: dict[str, int]
    cuttable: dict[str, float]
    blockers: tuple[Blocker, ...]


def reach_of(model: nn.Module, sites: Sites, families: Sequence[Family], groups: Sequence[ChannelGroup]) -> Reach:
    """What some families can reach on a model.

    Args:
        model: The model.
        sites: Its sites, with the fixed ones where channels are removed.
        families: That may be used.
        groups: Channel groups that can be removed; empty where none are.
    """
    least = {site.path: _least(site, families) for site in sites}
    total = sites.cost.amounts()
    by_ranks = _sum([sites.cost, *(least[site.path] - dense_cost(site) for site in sites)]).amounts()
    ways = [by_ranks, *(_by_channels(model, sites, groups, method) for method in families if _removes(method, groups))]
    touched = {path for group in groups for path in (*group.made, *group.read)}
    cut = _sum([dense_cost(site) for site in sites if least[site.path] != dense_cost(site) or site.path in touched])
    stays = {
        site.path: site.fixed or NOTHING_SMALLER
        for site in sites
        if least[site.path] == dense_cost(site) and site.path not in touched
    }
    carried = {name.rpartition(".")[0] for group in groups for name in group.carried} - set(least)
    cut = _sum([cut, *(_held(model, path) for path in carried)])
    return Reach(
        {name: min(way[name] for way in ways) for name in RESOURCES},
        {name: min(cut.amounts()[name] / max(total[name], 1), 1.0) for name in RESOURCES},
        tuple(each for each in blockers(sites, "params", most=None, frozen=stays) if each.path not in carried)[:SHOWN],
    )


def groups_of(model: nn.Module, sites: Sites) -> list[ChannelGroup]:
    """Channel groups that elimination can order; whether the model runs without them is tried only later."""
    return [group for group in find_channels(model, sites) if even(group)]


def _removes(method: Family, groups: Sequence[ChannelGroup]) -> bool:
    return isinstance(method, Interpolative) and bool(groups)


def _least(site: Site, families: Sequence[Family]) -> Cost:
    """The least a site costs in each resource, at the smallest rank of any family."""
    costs = [dense_cost(site)]
    for method in families if not site.fixed else ():
        shape = site.geometry.canonical_shape
        if isinstance(method, Decomposition) and method.refuses(shape) is None:
            costs.append(site_cost(site, method.form, method.candidates(shape)[0]))
    return Cost(*(min(cost.amounts()[name] for cost in costs) for name in RESOURCES))


def _by_channels(model: nn.Module, sites: Sites, groups: Sequence[ChannelGroup], method: Family) -> dict[str, int]:
    """The whole model with each group at as few units as the method leaves."""
    if not isinstance(method, Interpolative):
        raise TypeError(f"{method} removes no channels")
    curves = [RemovalCurve(group, torch.arange(group.units), torch.zeros(group.units + 1)) for group in groups]
    stacks = stacks_of(groups, multiple_of=method.multiple_of, uniform=method.uniform)
    widths = Widths(model, curves, sites, {}, stacks)
    for number, stack in enumerate(stacks):
        widths.set(number, stack.allowed[0])
    return widths.cost.amounts()


def _held(model: nn.Module, path: str) -> Cost:
    """Parameters of a module's own, and their bytes."""
    own = list(model.get_submodule(path).parameters(recurse=False))
    return Cost(sum(p.numel() for p in own), 0, sum(p.numel() * p.element_size() for p in own))


def _sum(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost())

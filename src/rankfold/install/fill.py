"""Decisions + layers → shells in their place, filled or still empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.allocation.measuring import moments_of
from rankfold.branches.installing import install_stands_
from rankfold.channels.narrowing import narrow_
from rankfold.decompositions import factorise
from rankfold.factors import Factors
from rankfold.install.swap import train_as_
from rankfold.install.tied import fill_head, for_lookups
from rankfold.layers import adapter_for, build_shell, fill_shell, form_of, swap
from rankfold.layers.tied import build_head, heads_of
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.sites.site import Site
from rankfold.statistics import Statistics

Fill: TypeAlias = Callable[[Decision, nn.Module, nn.Module], None]


def install_shells(model: nn.Module, plan: Plan, fill: Fill | None = None) -> nn.Module:
    """Put stands where branches go, cut channels, and replace every decided layer by its shell, under all its paths.

    Args:
        model: Model, changed in place.
        plan: Plan, checked against the model with `check_plan` before.
        fill: Function called with (decision, old layer, shell) before the shell is installed; None leaves it
            uninitialised.

    Returns:
        The root, which is a new module where the model itself is the layer.
    """
    narrow_(install_stands_(model, plan.stands), plan.cuts, plan.attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = heads_of(model)
    replaced: dict[int, nn.Module] = {}
    for decision in plan.changes:
        layer = modules[decision.site]
        adapter = adapter_for(layer)
        if adapter is None or decision.method is None or decision.rank is None:
            raise TypeError(f"{decision.site} was not checked")
        weight = adapter.canonical(layer)
        shell = build_shell(
            adapter.geometry(layer), decision.method.form, decision.rank, device=weight.device, dtype=weight.dtype
        )
        if fill is not None:
            fill(decision, layer, shell)
        train_as_(shell, layer)
        replaced[id(layer)] = shell.train(layer.training)
        if decision.site in heads:
            path = heads[decision.site]
            head = modules[path]
            built = build_head(head, shell)
            if fill is not None:
                fill(replace(decision, site=path), head, built)
            train_as_(built, head)
            replaced[id(head)] = built.train(head.training)
    return swap(model, replaced)


def filler(stats: Statistics | None, heads: Mapping[str, str] | None = None) -> Fill:
    """The closed-form fill without repair, see `unrepaired`.

    Args:
        stats: Statistics of the model; None where no method reads any.
        heads: Path of the head by the path of the table, for tables that are tied to one; None is no such.
    """
    heads = heads or {}
    ends = set(heads.values())

    def fill(decision: Decision, layer: nn.Module, shell: nn.Module) -> None:
        if decision.site in ends:
            fill_head(shell, layer, None if stats is None else stats.gradient_gram(decision.site, 0))
            return
        factors, bias = unrepaired(decision, layer, stats, heads.get(decision.site))
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{decision.site} was not checked")
        fill_shell(
            shell, adapter.stored(layer, factors), None if bias is None else bias.to(adapter.canonical(layer).dtype)
        )

    return fill


def unrepaired(
    decision: Decision, layer: nn.Module, stats: Statistics | None, head: str | None = None
) -> tuple[list[Factors], Tensor | None]:
    """A layer's factors and bias without repair: each group decomposed; a bias absorbs the change of the mean output.

    With `D = W − LR` and mean input `x̄`, the bias becomes `b + D x̄`, so the mean output is the original's.

    Args:
        decision: Decision about the layer.
        layer: The original, or narrowed, layer.
        stats: Statistics of the model; None where the method reads none.
        head: Path of the head whose weight is the layer's table; None where there is none.

    Returns:
        One `Factors` per group, none for a layer that stays dense; and the bias in the work dtype, None without one.
    """
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{decision.site} was not checked")
    geometry = adapter.geometry(layer)
    alone = Site(decision.site, (), adapter.kind, geometry, (), 1)
    site = alone if head is None else replace(alone, head=replace(alone, path=head))
    bias = adapter.bias(layer)
    wide = None if bias is None else widen(bias)
    if wide is None and decision.method is not None and form_of(decision.method.form).adds_bias:
        wide = widen(adapter.canonical(layer)).new_zeros(geometry.outputs)
    factors: list[Factors] = []
    shifts: list[Tensor] = []
    if decision.method is None or decision.rank is None:
        return factors, wide
    for group, own in enumerate(widen(adapter.canonical(layer))):
        moments = moments_of(site, group, decision.method, stats)
        factors.append(factorise(decision.method, own, decision.rank, moments))
        if head is not None and stats is not None and (gram := stats.moments(alone, group).gram) is not None:
            factors[-1] = for_lookups(factors[-1], gram)
        if wide is not None and decision.method.needs and moments.mean is not None:
            shifts.append((own - factors[-1].reconstruct()).flatten(1) @ moments.mean.to(own))
    if wide is not None and shifts:
        wide = wide + torch.cat(shifts)
    return factors, wide

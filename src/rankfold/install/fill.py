"""Decisions + layers → shells in their place, filled or still empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.allocation.measuring import moments_of
from rankfold.channels.narrowing import narrow_
from rankfold.decompositions import factorise
from rankfold.factors import Factors
from rankfold.install.swap import swap, train_as_
from rankfold.layers import adapter_for, build_shell, fill_shell
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.sites.site import Site
from rankfold.statistics import Statistics

Fill: TypeAlias = Callable[[Decision, nn.Module, nn.Module], None]


def install_shells(model: nn.Module, plan: Plan, fill: Fill | None = None) -> nn.Module:
    """Cut the channels that go, and replace every decided layer by its shell, under all paths of the module.

    Args:
        model: Model, changed in place.
        plan: Plan, checked against the model with `check_plan` before.
        fill: Function called with (decision, old layer, shell) before the shell is installed; None leaves it
            uninitialised.

    Returns:
        The root, which is a new module where the model itself is the layer.
    """
    narrow_(model, plan.cuts, plan.attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
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
    return swap(model, replaced)


def filler(stats: Statistics | None) -> Fill:
    """The closed-form fill without repair, see `unrepaired`."""

    def fill(decision: Decision, layer: nn.Module, shell: nn.Module) -> None:
        factors, bias = unrepaired(decision, layer, stats)
        adapter, own = adapter_for(layer), getattr(layer, "bias", None)
        if adapter is not None:
            factors = list(adapter.stored(layer, factors))
        fill_shell(shell, factors, None if bias is None or own is None else bias.to(own.dtype))

    return fill


def unrepaired(decision: Decision, layer: nn.Module, stats: Statistics | None) -> tuple[list[Factors], Tensor | None]:
    """A layer's factors and bias without repair: each group decomposed; a bias absorbs the change of the mean output.

    With `D = W − LR` and mean input `x̄`, the bias becomes `b + D x̄`, so the mean output is the original's.

    Args:
        decision: Decision about the layer.
        layer: The original, or narrowed, layer.
        stats: Statistics of the model; None where the method reads none.

    Returns:
        One `Factors` per group, none for a layer that stays dense; and the bias in the work dtype, None without one.
    """
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{decision.site} was not checked")
    geometry = adapter.geometry(layer)
    site = Site(decision.site, (), adapter.kind, geometry, (), 1)
    bias = adapter.bias(layer)
    wide = None if bias is None else widen(bias)
    factors: list[Factors] = []
    shifts: list[Tensor] = []
    if decision.method is None or decision.rank is None:
        return factors, wide
    for group, own in enumerate(widen(adapter.canonical(layer))):
        moments = moments_of(site, group, decision.method, stats)
        factors.append(factorise(decision.method, own, decision.rank, moments))
        if wide is not None and decision.method.needs and moments.mean is not None:
            shifts.append((own - factors[-1].reconstruct()).flatten(1) @ moments.mean.to(own))
    if wide is not None and shifts:
        wide = wide + torch.cat(shifts)
    return factors, wide

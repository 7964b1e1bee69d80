"""Removal curves + budget → how many units of each group stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from rankfold.channels.elimination import RemovalCurve
from rankfold.errors import BudgetError
from rankfold.graph.sites import Sites
from rankfold.metrics.cost import Cost, dense_cost

STEPS = 64  # a group's units go in about so many steps


def choose_widths(
    model: nn.Module,
    curves: Sequence[RemovalCurve],
    sites: Sites,
    bounds: Mapping[str, int],
    *,
    multiple_of: int = 1,
    relative: float = 0.0,
) -> dict[str, int]:
    """How many units of each group stay: the cheapest step first, until every bound holds.

    A step removes the next few units of one group; its price is the error it adds over the cost it saves, as shares of
    the bounds that do not hold yet. What a step saves depends on what is left of the layers on both sides, so prices
    are set anew after each.

    Args:
        model: The original.
        curves: One a group.
        sites: From `find_sites`.
        bounds: Absolute bounds on the whole model, by resource.
        multiple_of: Kept units are multiples of this, where a group has so many.
        relative: How much errors relative to each reader's own output count beside weighted ones, in [0, 1]; both
            scaled so that losing every group costs 1.

    Returns:
        Kept units by group.

    Raises:
        BudgetError: The bounds are not met with one step of units left in every group.
    """
    ledger = _Ledger(model, curves, sites)
    errors = _blended(curves, relative)
    left = [curve.group.units for curve in curves]
    steps = [_step(units, multiple_of) for units in left]
    while broken := [name for name, bound in bounds.items() if ledger.cost.amounts()[name] > bound]:
        best, chosen = float("inf"), None
        for i, curve in enumerate(curves):
            after = _next(left[i], steps[i], multiple_of)
            if after < 1:
                continue
            saved = ledger.saved(i, left[i], after).amounts()
            worth = sum(saved[name] / max(bounds[name], 1) for name in broken)
            units = curve.group.units
            price = float(errors[i][units - after] - errors[i][units - left[i]]) / max(worth, 1e-30)
            if worth > 0 and price < best:
                best, chosen = price, (i, after)
        if chosen is None:
            reached = ledger.cost.amounts()
            raise BudgetError(
                f"Budget.{broken[0]}",
                law="the smallest reachable model is within every bound",
                got=", ".join(
                    f"{name} at most {bounds[name]} where the smallest is {reached[name]}" for name in broken
                ),
                cure="raise the bound, or allow families that shrink layers without channel groups",
                smallest=reached,
            )
        i, after = chosen
        ledger.take(i, left[i], after)
        left[i] = after
    for i in sorted(range(len(curves)), key=lambda i: -_last(errors[i], left[i], steps[i])):
        _give_back(ledger, curves[i], i, left, bounds, multiple_of)
    return {curve.group.name: units for curve, units in zip(curves, left, strict=True)}


def _step(units: int, multiple_of: int) -> int:
    return -(-max(1, units // STEPS) // multiple_of) * multiple_of


def _next(left: int, step: int, multiple_of: int) -> int:
    """Units left after one step more: a multiple where the group has so many, else the group stays whole."""
    return (left - step) // multiple_of * multiple_of if left > multiple_of else 0


def _blended(curves: Sequence[RemovalCurve], relative: float) -> list[torch.Tensor]:
    """Errors of every group by units removed."""
    parts = []
    for share, own in ((1 - relative, [c.errors for c in curves]), (relative, [c.relative for c in curves])):
        whole = sum(float(errors[-1]) for errors in own) or 1.0
        parts.append([share / whole * errors for errors in own])
    return [first + second for first, second in zip(*parts, strict=True)]


def _last(errors: torch.Tensor, left: int, step: int) -> float:
    """Error of the last step taken."""
    units = len(errors) - 1
    return float(errors[units - left] - errors[max(0, units - left - step)])


def same_share(
    model: nn.Module,
    curves: Sequence[RemovalCurve],
    sites: Sites,
    bounds: Mapping[str, int],
    *,
    multiple_of: int = 1,
) -> dict[str, int]:
    """The same share of every group, as large as the bounds let it be; a stream that many layers write stays whole.

    Args:
        model: The original.
        curves: One a group.
        sites: From `find_sites`.
        bounds: Absolute bounds on the whole model, by resource.
        multiple_of: Kept units are multiples of this, where a group has so many.

    Returns:
        Kept units by group.

    Raises:
        BudgetError: The bounds are not met with one unit left in every group.
    """
    ledger = _Ledger(model, curves, sites)
    left = [curve.group.units for curve in curves]
    for spared in (True, False):
        for percent in range(100, 0, -1):
            for i, curve in enumerate(curves):
                units = curve.group.units
                kept = units if spared and len(curve.group.made) > 1 else max(1, units * percent // 100)
                kept = max(multiple_of, kept // multiple_of * multiple_of) if units > multiple_of else units
                ledger.take(i, left[i], kept)
                left[i] = kept
            if all(ledger.cost.amounts()[name] <= bound for name, bound in bounds.items()):
                for i, curve in enumerate(curves):
                    _give_back(ledger, curve, i, left, bounds, multiple_of)
                return {curve.group.name: kept for curve, kept in zip(curves, left, strict=True)}
    raise BudgetError(
        f"Budget.{next(iter(bounds))}",
        law="the smallest reachable model is within every bound",
        got="no share of the groups that meets them",
        cure="raise the bound, or allow families that shrink layers without channel groups",
    )


def _give_back(
    ledger: _Ledger, curve: RemovalCurve, i: int, left: list[int], bounds: Mapping[str, int], multiple_of: int
) -> None:
    """Units that fit again, since a last step went further than it had to."""
    while left[i] < curve.group.units:
        more = min(curve.group.units, left[i] + multiple_of)
        ledger.take(i, left[i], more)
        if any(ledger.cost.amounts()[name] > bound for name, bound in bounds.items()):
            ledger.take(i, more, left[i])
            return
        left[i] = more


class _Ledger:
    """What the model costs as units go: channels left of every layer, and the whole.

    Args:
        model: The original.
        curves: One a group.
        sites: From `find_sites`.
    """

    def __init__(self, model: nn.Module, curves: Sequence[RemovalCurve], sites: Sites) -> None:
        self.cost = sites.cost
        self._sites = {site.path: site for site in sites}
        self._layers: dict[tuple[str, int, int], Cost] = {}
        self._left = {site.path: [site.geometry.inputs, site.geometry.outputs] for site in sites}
        parameters = dict(model.named_parameters())
        tensors = {**parameters, **dict(model.named_buffers())}
        weights = {f"{path}.weight" if path else "weight": path for path in self._sites}
        biases = {f"{path}.bias" if path else "bias" for path in self._sites}
        self._changes: list[dict[str, list[torch.Tensor]]] = []  # group → layer → inputs, outputs gone by units removed
        self._carried: list[
            torch.Tensor
        ] = []  # group → parameters and bytes gone by units removed, shape (2, units + 1)
        for curve in curves:
            units, order = curve.group.units, curve.order
            changes: dict[str, list[torch.Tensor]] = {}

            def gone(own: Sequence[int], units: int = units, order: torch.Tensor = order) -> torch.Tensor:
                places = torch.tensor(own)
                counts = torch.bincount(places[places >= 0], minlength=units)[order]
                return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

            for side, table in enumerate((curve.group.read, curve.group.made)):
                for path, own in table.items():
                    changes.setdefault(path, [torch.zeros(units + 1, dtype=torch.int64)] * 2)[side] = gone(own)
            carried = torch.zeros(3, units + 1, dtype=torch.int64)
            if curve.group.macs:
                carried[2, 1:] = torch.tensor(curve.group.macs)[order].cumsum(0)
            for name, axes in curve.group.carried.items():
                if name in weights:  # a depthwise convolution
                    both = gone(axes[0])
                    changes[weights[name]] = [both, both]
                elif name not in biases and name in tensors:
                    value = tensors[name]
                    for axis, own in axes.items():
                        slices = gone(own) * (value.numel() // value.shape[axis])
                        carried[0] += slices * (name in parameters)
                        carried[1] += slices * value.element_size()
            self._changes.append(changes)
            self._carried.append(carried)

    def saved(self, group: int, left: int, after: int) -> Cost:
        """What a step saves."""
        total = Cost()
        units = self._carried[group].shape[1] - 1
        for path, (inputs, outputs) in self._changes[group].items():
            have_in, have_out = self._left[path]
            fewer_in = int(inputs[units - after] - inputs[units - left])
            fewer_out = int(outputs[units - after] - outputs[units - left])
            after_in, after_out = have_in - fewer_in, have_out - fewer_out
            total = total + self._layer(path, have_in, have_out) - self._layer(path, after_in, after_out)
        gone = self._carried[group][:, units - after] - self._carried[group][:, units - left]
        return total + Cost(int(gone[0]), int(gone[2]), int(gone[1]))

    def take(self, group: int, left: int, after: int) -> None:
        """Carry out a step, forwards or back."""
        self.cost = self.cost - self.saved(group, left, after)
        units = self._carried[group].shape[1] - 1
        for path, (inputs, outputs) in self._changes[group].items():
            self._left[path][0] -= int(inputs[units - after] - inputs[units - left])
            self._left[path][1] -= int(outputs[units - after] - outputs[units - left])

    def _layer(self, path: str, inputs: int, outputs: int) -> Cost:
        """Cost of a layer with so many channels left."""
        known = self._layers.get((path, inputs, outputs))
        if known is None:
            site = self._sites[path]
            groups = inputs if site.geometry.groups > 1 else 1
            geometry = replace(site.geometry, inputs=inputs, outputs=outputs, groups=groups)
            known = self._layers[path, inputs, outputs] = dense_cost(replace(site, geometry=geometry))
        return known

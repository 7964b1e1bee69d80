"""Cost of a model while units of its channel groups are removed, step by step."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rankfold.allocation import Curves
from rankfold.channels.elimination import RemovalCurve
from rankfold.channels.groups import ChannelGroup
from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.errors import BudgetError
from rankfold.sites.reach import NO_CHANNELS, unreachable
from rankfold.sites.site import Sites

NAMES = tuple(RESOURCES)


@dataclass(frozen=True)
class Stack:
    """Groups that keep equally many units.

    Attributes:
        members: Indices of the groups in the list of all groups.
        allowed: Numbers of units that each group may keep, ascending; the last is all.
    """

    members: tuple[int, ...]
    allowed: tuple[int, ...]


class Widths:
    """Numbers of units left of each group on the way to a budget, and what the model then costs.

    Args:
        model: The original model.
        curves: Removal curves, one for each group.
        sites: Sites of the model, from `find_sites`.
        bounds: Absolute bounds on the whole model, by resource.
        stacks: Groups that go together, with the numbers of units they may keep.
        ranks: Curves of the ranks of the model's layers, for selectors that read "ranks".
    """

    def __init__(
        self,
        model: nn.Module,
        curves: Sequence[RemovalCurve],
        sites: Sites,
        bounds: Mapping[str, int],
        stacks: Sequence[Stack],
        ranks: Curves | None = None,
    ) -> None:
        self.ranks, self.sites = ranks, sites
        self.curves, self.bounds, self.stacks = tuple(curves), dict(bounds), tuple(stacks)
        self._costs = _Costs(model, curves, sites)
        self.left = [self.units(s) for s in range(len(self.stacks))]

    def units(self, stack: int) -> int:
        """Units that each group of a stack had."""
        return self.stacks[stack].allowed[-1]

    def groups(self, stack: int) -> tuple[RemovalCurve, ...]:
        """The groups of a stack."""
        return tuple(self.curves[i] for i in self.stacks[stack].members)

    @property
    def cost(self) -> Cost:
        """Cost of the whole model."""
        return self._costs.cost

    def broken(self) -> list[str]:
        """Resources whose bound does not hold yet."""
        amounts = self.cost.amounts()
        return [name for name, bound in self.bounds.items() if amounts[name] > bound]

    def rounded(self, stack: int, wanted: int) -> int:
        """The allowed number of units at or below a wanted one; the smallest allowed where there is none below."""
        allowed = self.stacks[stack].allowed
        return allowed[max(0, bisect_right(allowed, wanted) - 1)]

    def saved(self, stack: int, after: int) -> Cost:
        """Approximate saving when the groups of a stack go down to `after` units."""
        return sum((self._costs.saved(i, self.left[stack], after) for i in self.stacks[stack].members), Cost())

    def touched(self, stack: int) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Input and output channels that each layer loses, by units of a stack removed, shape (units + 1,) each."""
        found: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for i in self.stacks[stack].members:
            for path, (inputs, outputs) in self._costs.changes[i].items():
                before = found.get(path, (np.zeros_like(inputs.numpy()),) * 2)
                found[path] = before[0] + inputs.numpy(), before[1] + outputs.numpy()
        return found

    def carried(self, stack: int, resource: str) -> NDArray[np.int64]:
        """What goes with units of a stack outside the layers, by units removed, shape (units + 1,)."""
        own = [self._costs.carried[i][NAMES.index(resource)].numpy() for i in self.stacks[stack].members]
        return np.sum(own, axis=0)  # type: ignore[no-any-return]

    def work(self, stack: int) -> int:
        """MACs of the layers that make and read a stack, as they are now."""
        return sum(self._costs.work(i) for i in self.stacks[stack].members)

    def set(self, stack: int, after: int) -> None:
        """Set the units left of each group of a stack, down or back up."""
        for i in self.stacks[stack].members:
            self._costs.take(i, self.left[stack], after)
        self.left[stack] = after

    def give_back(self, stacks: Sequence[int]) -> None:
        """Let units that fit again come back, stack after stack, since a last step went further than it had to."""
        for stack in stacks:
            while (have := self.left[stack]) < self.units(stack):
                allowed = self.stacks[stack].allowed
                self.set(stack, allowed[bisect_right(allowed, have)])
                if self.broken():
                    self.set(stack, have)
                    break

    def chosen(self) -> dict[str, int]:
        """Units left by name of the group."""
        return {curve.group.name: left for stack, left in enumerate(self.left) for curve in self.groups(stack)}

    def impossible(self) -> BudgetError:
        """The error for bounds that are broken where no step is left."""
        reached = self.cost.amounts()
        touched = {path for curve in self.curves for path in (*curve.group.made, *curve.group.read)}
        touched |= {name.rpartition(".")[0] for curve in self.curves for name in curve.group.carried}
        return unreachable(
            self.sites.whole,
            self.bounds,
            {name: reached[name] for name in self.bounds},
            sites=self.sites,
            frozen={site.path: NO_CHANNELS for site in self.sites if site.path not in touched},
            reduced=touched,
            cure="allow families that shrink layers without channel groups, or ask for no multiples",
        )


def stacks_of(
    groups: Sequence[ChannelGroup],
    *,
    multiple_of: int = 1,
    uniform: bool = False,
    allowed: Callable[[Sequence[ChannelGroup]], Collection[int]] | None = None,
) -> tuple[Stack, ...]:
    """Groups that go together, with the numbers of units they may keep.

    Args:
        groups: All groups.
        multiple_of: Number of which kept units are a multiple, where a group has so many.
        uniform: True if groups at the same place of like layers go together.
        allowed: Function of the groups that go together, which returns the numbers of units below the whole that they
            may keep; None allows all.
    """
    numbers: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        numbers.setdefault(_place_of(group) if uniform else i, []).append(i)
    stacks = []
    for members in numbers.values():
        own = [groups[i] for i in members]
        units = own[0].units
        fewer = range(multiple_of, units, multiple_of) if units > multiple_of else range(0)
        fits = fewer if allowed is None else set(allowed(own))
        stacks.append(Stack(tuple(members), (*(count for count in fewer if count in fits), units)))
    return tuple(stacks)


def _place_of(group: ChannelGroup) -> tuple[object, ...]:
    """Key that groups at the same place of like layers share: their size, and their paths but for the numbers."""
    paths = [re.sub(r"\d+", "*", path) for path in (group.name, *group.made, *group.read)]
    return (group.units, *paths)


class _Costs:
    """Channels left of every layer, and the cost of the whole model.

    Args:
        model: The original model.
        curves: Removal curves, one for each group.
        sites: Sites of the model, from `find_sites`.
    """

    def __init__(self, model: nn.Module, curves: Sequence[RemovalCurve], sites: Sites) -> None:
        self.cost = sites.cost
        self._sites = {site.path: site for site in sites}
        self._layers: dict[tuple[str, int, int], Cost] = {}
        self._left = {site.path: [site.geometry.inputs, site.geometry.outputs] for site in sites}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        weights = {f"{path}.weight" if path else "weight": path for path in self._sites}
        biases = {f"{path}.bias" if path else "bias" for path in self._sites}
        self.changes: list[dict[str, list[torch.Tensor]]] = []  # group → layer → inputs, outputs gone by units removed
        self.carried: list[torch.Tensor] = []  # group → amounts gone by units removed, shape (resources, units + 1)
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
            carried = torch.zeros(len(RESOURCES), units + 1, dtype=torch.int64)
            if curve.group.macs:
                carried[NAMES.index("macs"), 1:] = torch.tensor(curve.group.macs)[order].cumsum(0)
            for name, axes in curve.group.carried.items():
                if name in weights:  # a depthwise convolution, or a table
                    both = gone(next(iter(axes.values())))
                    changes[weights[name]] = [both, both]
                elif name not in biases and name in tensors:
                    value = tensors[name]
                    for axis, own in axes.items():
                        slices = gone(own) * (value.numel() // value.shape[axis])
                        carried[NAMES.index("params")] += slices * (name in parameters)
                        carried[NAMES.index("bytes")] += slices * value.element_size()
            self.changes.append(changes)
            self.carried.append(carried)

    def saved(self, group: int, left: int, after: int) -> Cost:
        """Saving of a step."""
        total = Cost()
        units = self.carried[group].shape[1] - 1
        for path, (inputs, outputs) in self.changes[group].items():
            have_in, have_out = self._left[path]
            fewer_in = int(inputs[units - after] - inputs[units - left])
            fewer_out = int(outputs[units - after] - outputs[units - left])
            after_in, after_out = have_in - fewer_in, have_out - fewer_out
            total = total + self._layer(path, have_in, have_out) - self._layer(path, after_in, after_out)
        gone = self.carried[group][:, units - after] - self.carried[group][:, units - left]
        return total + Cost(*map(int, gone))

    def take(self, group: int, left: int, after: int) -> None:
        """Carry out a step, forwards or back."""
        self.cost = self.cost - self.saved(group, left, after)
        units = self.carried[group].shape[1] - 1
        for path, (inputs, outputs) in self.changes[group].items():
            self._left[path][0] -= int(inputs[units - after] - inputs[units - left])
            self._left[path][1] -= int(outputs[units - after] - outputs[units - left])

    def work(self, group: int) -> int:
        """MACs of the layers that a group touches, as they are now."""
        return sum(self._layer(path, *self._left[path]).macs for path in self.changes[group])

    def _layer(self, path: str, inputs: int, outputs: int) -> Cost:
        """Cost of a layer with so many channels left."""
        known = self._layers.get((path, inputs, outputs))
        if known is None:
            site = self._sites[path]
            groups = inputs if site.geometry.groups > 1 else 1
            geometry = replace(site.geometry, inputs=inputs, outputs=outputs, groups=groups)
            known = self._layers[path, inputs, outputs] = dense_cost(replace(site, geometry=geometry))
        return known

"""Groups of channels that must be removed together, the tensors that carry them, and the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor, nn

from rankfold.channels.coordinates import STAYS, Flow
from rankfold.channels.flow import TIED, follow
from rankfold.errors import SiteError, near_matches
from rankfold.sites.finding import check_sites
from rankfold.sites.site import Sites, Skip

Units = tuple[int, ...]  # number of the unit, in the group, of every index along an axis; -1 for none


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together. A unit is the least that can go: one channel, or all that hang on it.

    Attributes:
        name: Path of the first layer that makes the channels.
        units: Number of units.
        made: Layers that make the channels: path → unit of every output channel.
        carried: Parameters and buffers that go along: name → axis → unit of every index.
        read: Layers that read the channels: path → unit of every input channel (feature of a linear layer).
        macs: MACs per sample that go with each unit beside those of the layers: attention of a head.
        attributes: Numbers that modules keep and that shrink along: path of the module → attribute → its whole value.
    """

    name: str
    units: int
    made: dict[str, Units] = field(hash=False)
    carried: dict[str, dict[int, Units]] = field(hash=False)
    read: dict[str, Units] = field(hash=False)
    macs: tuple[int, ...] = ()
    attributes: dict[str, dict[str, int]] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """Text with one line for each role."""
        lines = [f"{self.name}: {self.units} units"]
        lines.append(f"  made by {', '.join(self.made)}")
        if self.carried:
            lines.append(f"  carried by {', '.join(self.carried)}")
        lines.append(f"  read by {', '.join(self.read)}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Channels(Sequence[ChannelGroup]):
    """Result of `find_channels`.

    Attributes:
        groups: Groups in the order of the graph.
        skips: Layers whose output channels must stay, with the reason.
    """

    groups: tuple[ChannelGroup, ...]
    skips: tuple[Skip, ...]

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ChannelGroup]: ...
    def __getitem__(self, index: int | slice) -> ChannelGroup | Sequence[ChannelGroup]:
        """The group at a position."""
        return self.groups[index]

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        """The groups."""
        return iter(self.groups)

    def at(self, name: str) -> ChannelGroup:
        """The group of a name, or of any layer that makes its channels.

        Raises:
            SiteError: There is no such group; near matches are named.
        """
        for group in self.groups:
            if name == group.name or name in group.made:
                return group
        reason = next((skip.reason for skip in self.skips if skip.path == name), None)
        raise SiteError(
            repr(name),
            law="the name of a channel group",
            got="an unknown name" if reason is None else f"channels that must stay ({reason})",
            cure=near_matches(name, [path for group in self.groups for path in group.made]),
        )


def find_channels(model: nn.Module, sites: Sites) -> Channels:
    """Find the groups of channels that can be removed, and the reason for every layer whose channels cannot.

    Args:
        model: The model.
        sites: Sites of the model, from `find_sites`; layers that are neither sites nor fixed freeze what they read.

    Returns:
        The groups and skips; without a graph there is no group.

    Raises:
        ModelError: The model is no module, or has tensors on meta.
        OptionError: The sites are not what `find_sites` returns.
        SiteError: The sites are of another model.
    """
    check_sites(model, sites)
    program = sites.graph.program
    if program is None:
        reason = f"no graph: {sites.graph.reason}"
        return Channels((), tuple(Skip(site.path, reason) for site in sites))
    known = (*sites, *sites.fixed)
    layers = {_weight_of(path): site.path for site in known for path in site.paths if site.head is None}
    left = {_weight_of(skip.path): skip.reason for skip in sites.skips}
    left |= {_weight_of(path): TIED for site in known for path in site.paths if site.head is not None}
    flow = follow(program, layers, left)
    return _grouped(flow)


def _weight_of(path: str) -> str:
    """Name of a layer's weight parameter."""
    return f"{path}.weight" if path else "weight"


def _grouped(flow: Flow) -> Channels:
    """Channels that meet in one layer are of one group."""
    roots = {path: [flow.root(number) for number in numbers.tolist()] for path, numbers in flow.made.items()}
    readers: set[int] = {
        flow.root(number) for numbers in flow.read.values() for number in numbers.tolist() if number != STAYS
    }
    skips, free = [], {}
    for path, own in roots.items():
        removable = [root for root in own if root in readers and flow.why_frozen(root) is None]
        if removable:
            free[path] = removable
        else:
            why = next((reason for root in own if (reason := flow.why_frozen(root)) is not None), None)
            skips.append(Skip(path, f"frozen: {why or 'no layer that can be changed reads it'}"))
    groups = []
    for members in _connected(free):
        units = {root: unit for unit, root in enumerate(dict.fromkeys(r for path in members for r in free[path]))}
        if len(units) < 2:
            mixed = {flow.root(number): why for number, why in flow.mixed.items()}
            skips.append(Skip(members[0], f"frozen: {mixed.get(next(iter(units)), 'it is a single channel')}"))
            continue

        def places(numbers: Tensor, units: dict[int, int] = units) -> Units:
            return tuple(-1 if n == STAYS else units.get(flow.root(n), -1) for n in numbers.tolist())

        made = {path: places(flow.made[path]) for path in members}
        read = {path: at for path, numbers in flow.read.items() if max(at := places(numbers)) >= 0}
        carried: dict[str, dict[int, Units]] = {}
        for name, axes in flow.carried.items():
            for axis, numbers in axes.items():
                if max(at := places(numbers)) >= 0:
                    carried.setdefault(name, {})[axis] = at
        macs = [0] * len(units)
        for numbers, each in flow.attended:
            for unit in places(numbers):
                if unit >= 0:
                    macs[unit] += each
        groups.append(ChannelGroup(members[0], len(units), made, carried, read, tuple(macs)))
    return Channels(tuple(groups), tuple(skips))


def _connected(free: dict[str, list[int]]) -> list[list[str]]:
    """Layers in sets that share a channel, in order."""
    owner: dict[int, int] = {}
    sets: list[list[str]] = []
    for path, roots in free.items():
        found = sorted({owner[root] for root in roots if root in owner})
        target = found[0] if found else len(sets)
        if not found:
            sets.append([])
        for other in found[1:]:
            sets[target] += sets[other]
            sets[other] = []
        sets[target].append(path)
        owner.update(dict.fromkeys(roots, target))
        for root, place in owner.items():
            if place in found[1:]:
                owner[root] = target
    return [members for members in sets if members]


def kept_indices(units: Sequence[Units], kept: Sequence[Tensor]) -> Tensor:
    """Indices that stay along an axis, given which units of each group stay.

    Args:
        units: Unit of every index along the axis, for every group that touches it.
        kept: Mask over the units of each of these groups: True stays.
    """
    stays = torch.ones(len(units[0]), dtype=torch.bool)
    for own, mask in zip(units, kept, strict=True):
        places = torch.tensor(own)
        inside = places >= 0
        stays[inside] &= mask[places[inside]]
    return torch.nonzero(stays).flatten()

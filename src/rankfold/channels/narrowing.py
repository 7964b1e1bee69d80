"""Channels that stay → a narrower model: plain modules with smaller tensors, and corrections folded into readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.channels.groups import ChannelGroup, kept_indices
from rankfold.errors import PlanError
from rankfold.layers import Geometry, adapter_for, resize, tensor
from rankfold.linalg.interpolative import folded
from rankfold.linalg.precision import widen
from rankfold.sites.finding import fingerprint
from rankfold.sites.site import Site, Sites
from rankfold.statistics import InputGroups, LossGradient, Statistic, Statistics

Cuts = Mapping[str, Mapping[int, tuple[int, ...]]]  # parameter or buffer → axis → indices that stay
Attributes = Mapping[str, Mapping[str, int]]  # path of a module → attribute → its value
FOLD_DAMPING = 1e-6


@dataclass(frozen=True, eq=False)
class Kept:
    """Channels of a layer that stay.

    Attributes:
        inputs: Input channels (features of a linear layer) that stay; None for all.
        outputs: Output channels that stay; None for all.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether any channel goes."""
        return self.inputs is not None or self.outputs is not None


def cuts_of(model: nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Indices that stay of every tensor, given which units of each group stay.

    Args:
        model: The original model.
        groups: Channel groups of the model.
        masks: Mask over the units of some groups, by name of the group: True stays.
    """
    touched: dict[tuple[str, int], tuple[list[Any], list[Tensor]]] = {}

    def note(name: str, axis: int, units: tuple[int, ...], mask: Tensor) -> None:
        own = touched.setdefault((name, axis), ([], []))
        own[0].append(units)
        own[1].append(mask)

    modules = dict(model.named_modules(remove_duplicate=False))
    for group in groups:
        mask = masks.get(group.name)
        if mask is None or bool(mask.all()):
            continue
        for path, units in group.made.items():
            note(f"{path}.weight" if path else "weight", _weight_axes(modules[path])[0], units, mask)
        for path, units in group.read.items():
            note(f"{path}.weight" if path else "weight", _weight_axes(modules[path])[1], units, mask)
        for name, axes in group.carried.items():
            for axis, units in axes.items():
                note(name, axis, units, mask)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), (noted, chosen) in touched.items():
        cuts.setdefault(name, {})[axis] = tuple(kept_indices(noted, chosen).tolist())
    return cuts


def kept_of(path: str, layer: nn.Module, cuts: Cuts) -> Kept:
    """Channels that the cuts leave of a layer."""
    own = cuts.get(f"{path}.weight" if path else "weight", {})
    out_axis, in_axis = _weight_axes(layer)

    def indices(axis: int) -> Tensor | None:
        return torch.tensor(own[axis]) if axis in own else None

    if getattr(layer, "groups", 1) > 1:  # depthwise: each channel reads itself
        return Kept(indices(0), indices(0))
    return Kept(indices(in_axis), indices(out_axis))


def _weight_axes(layer: nn.Module) -> tuple[int, int]:
    """Axes of the stored weight that are outputs and inputs."""
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{type(layer).__name__} has no adapter")
    return adapter.weight_axes


def narrowed_geometry(geometry: Geometry, kept: Kept) -> Geometry:
    """The geometry of a layer with the channels that stay."""
    inputs = geometry.inputs if kept.inputs is None else len(kept.inputs)
    outputs = geometry.outputs if kept.outputs is None else len(kept.outputs)
    if geometry.table is not None:  # the identity behind it is as wide as its vectors
        inputs = outputs
    groups = inputs if geometry.groups > 1 and kept else geometry.groups
    return replace(geometry, inputs=inputs, outputs=outputs, groups=groups)


def attributes_of(groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """New values of the numbers that modules keep, when some units are gone.

    Args:
        groups: Channel groups.
        masks: Mask over the units of some groups, by name of the group: True stays.
    """
    changed: dict[str, dict[str, int]] = {}
    for group in groups:
        mask = masks.get(group.name)
        if mask is None or bool(mask.all()):
            continue
        for path, own in group.attributes.items():
            for name, value in own.items():
                changed.setdefault(path, {})[name] = value // group.units * int(mask.sum())
    return changed


def narrow_(model: nn.Module, cuts: Cuts, attributes: Attributes | None = None) -> nn.Module:
    """Cut the tensors of a model, and set the attributes of its modules that hold their sizes.

    Args:
        model: Model that is changed in place; its parameters are replaced by new ones.
        cuts: Indices that stay, by tensor and axis.
        attributes: New values of numbers that modules keep.

    Raises:
        PlanError: A tensor is named that the model does not have; nothing is changed.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if missing := [name for name in cuts if name not in known]:
        raise PlanError(
            missing[0],
            law="a tensor of the model that is cut",
            got="none of that name",
            cure="cut the model that the plan was made for, its attention split as there",
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, own in ({} if attributes is None else attributes).items():
        for name, value in own.items():
            setattr(modules[path], name, value)
    owners = {name.rpartition(".")[0] for name in cuts}
    done: set[tuple[int, str]] = set()  # a module that has several names is cut under the first that is named
    for path, module in list(model.named_modules(remove_duplicate=False)):
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, value in list(table.items()):
                axes = cuts.get(prefix + name)
                if value is None or axes is None or (id(module), name) in done:
                    continue
                done.add((id(module), name))
                smaller = value.detach()
                for axis, indices in axes.items():
                    smaller = smaller.index_select(axis, torch.tensor(indices, device=value.device))
                smaller = smaller.contiguous().clone()
                if isinstance(value, nn.Parameter):
                    module._parameters[name] = nn.Parameter(smaller, requires_grad=value.requires_grad)
                else:
                    module._buffers[name] = smaller
        if path in owners:
            resize(module)
    return model


def narrowed_site(site: Site, kept: Kept) -> Site:
    """A site of the narrowed model."""
    return replace(site, geometry=narrowed_geometry(site.geometry, kept))


def narrowed_sites(model: nn.Module, sites: Sites, cuts: Cuts) -> tuple[Site, ...]:
    """The sites as the cuts leave them.

    Args:
        model: The original model.
        sites: Sites of the original.
        cuts: Indices that stay, by tensor and axis.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return tuple(narrowed_site(site, kept_of(site.path, modules[site.path], cuts)) for site in sites)


def narrowed_statistics(stats: Statistics, model: nn.Module, sites: Sites, cuts: Cuts, print_of: str) -> Statistics:
    """The statistics of the channels that stay.

    Args:
        stats: Statistics of the original.
        model: The original model.
        sites: Sites of the original.
        cuts: Indices that stay, by tensor and axis.
        print_of: Fingerprint of the narrowed model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    result = {}
    for site in sites:
        kept = kept_of(site.path, modules[site.path], cuts)
        depthwise = site.geometry.groups > 1
        own: dict[str, Statistic] = {}
        itself = depthwise or site.geometry.table is not None  # what goes of its outputs goes of its inputs
        index = kept.outputs if itself else features_of(site.geometry, kept)
        for name, statistic in stats.sites.get(site.path, {}).items():
            if isinstance(statistic, LossGradient):  # of the whole weight; what is left of it was not collected
                continue
            if isinstance(statistic, InputGroups):
                own[name] = statistic.narrowed(index, groups=bool(depthwise and kept))
                continue
            if not statistic.of_channels:
                own[name] = statistic
                continue
            axis = 0 if depthwise and kept else 1
            place = kept.outputs if statistic.reads_outputs else index
            total, first = (_cut_sum(each, place, axis) for each in (statistic.total, statistic.first))
            own[name] = type(statistic)(statistic.count, total, statistic.first_count, first)
        result[site.path] = own
        if site.head is not None and site.head.path in stats.sites:  # none of its channels can go
            result[site.head.path] = stats.sites[site.head.path]
    return Statistics(result, dict(stats.manifest), print_of)


def _cut_sum(total: Tensor | None, kept: Tensor | None, axis: int) -> Tensor | None:
    """A sum cut to what stays: some groups (axis 0), or some features of every group, on both sides of a Gram."""
    if total is None or kept is None:
        return total
    place = kept.to(total.device)
    if axis == 0:
        return total[place]
    return total[:, place] if total.ndim == 2 else total[:, place][:, :, place]


def features_of(geometry: Geometry, kept: Kept) -> Tensor | None:
    """Places in a flattened patch `in·k…` of the input channels that stay; None for all."""
    if kept.inputs is None or geometry.groups > 1:
        return None
    return features(kept.inputs, geometry.features // geometry.inputs)


def features(channels: Tensor, taps: int) -> Tensor:
    """Places in a flattened patch `in·k…` of some channels, `taps` each."""
    return (channels[:, None] * taps + torch.arange(taps)).flatten()


def fold_(
    model: nn.Module,
    sites: Sites,
    cuts: Cuts,
    stats: Statistics,
    norms: Mapping[str, str | None],
    *,
    damping: float = FOLD_DAMPING,
) -> None:
    """Fold into every layer that reads removed channels their linear prediction from the others.

    `W ← W Tᵀ`, `T = A_JJ⁻¹ A_J`, from `folded`, is the least-squares weight on the channels `J` that stay, in the
    metric of the layer's own inputs: covariances where a bias, or a batch norm right behind, takes up the mean; raw
    moments otherwise. The columns of removed channels become zero, so that cutting them afterwards changes nothing.

    Args:
        model: Model that is changed in place; not yet cut.
        sites: Sites of the model.
        cuts: Indices that stay, by tensor and axis.
        stats: Statistics of the original, with input Grams and means.
        norms: Name of the running mean of the batch norm that can absorb a layer's bias, by path of the layer.
        damping: Relative damping of `A_JJ`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for site in sites:
        layer = modules[site.path]
        kept = kept_of(site.path, layer, cuts)
        places, adapter = features_of(site.geometry, kept), adapter_for(layer)
        if places is None or adapter is None:
            continue
        norm = None if site.geometry.bias else norms.get(site.path)
        moments = replace(stats.moments(site, 0), bias=site.geometry.bias or norm is not None)
        old = widen(adapter.canonical(layer))[0].flatten(1)
        new = torch.zeros_like(old)
        new[:, places] = folded(old, moments.metric(site.path).to(old), places, damping=damping)
        mean = old.new_zeros(old.shape[1]) if moments.mean is None else moments.mean.to(old)
        with torch.no_grad():
            canonical = adapter.canonical(layer)
            canonical.copy_(new.reshape(canonical.shape))
            shift = (old - new) @ mean
            if site.geometry.bias:
                tensor(layer, "bias").add_(shift.to(canonical.dtype))
            elif norm is not None:
                buffers[norm].sub_(shift.to(buffers[norm].dtype))


def fold_and_cut_(
    target: nn.Module,
    model: nn.Module,
    sites: Sites,
    cuts: Cuts,
    stats: Statistics | None,
    norms: Mapping[str, str | None] | None,
    attributes: Attributes | None = None,
) -> Statistics | None:
    """Fold and cut the channels of a copy.

    Args:
        target: The copy.
        model: The original model.
        sites: Sites of the original.
        cuts: Indices that stay, by tensor and axis.
        stats: Statistics of the original.
        norms: Names of running means, as for `fold_`; None folds nothing.
        attributes: New values of numbers that modules keep, as for `narrow_`.

    Returns:
        The statistics of the channels that stay; None without statistics.
    """
    if stats is not None and norms is not None:
        fold_(target, sites, cuts, stats, norms)
    narrow_(target, cuts, attributes)
    return None if stats is None else narrowed_statistics(stats, model, sites, cuts, fingerprint(target))

"""Which channels stay → a narrower model: plain modules with smaller tensors, and corrections folded into who reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.graph.channels import ChannelGroup, kept_indices
from rankfold.graph.sites import Site, Sites, fingerprint
from rankfold.layers import Geometry, adapter_for, tensor
from rankfold.linalg.precision import widen
from rankfold.linalg.whitening import cholesky, damped_gram
from rankfold.metrics.cost import Cost, dense_cost
from rankfold.statistics import Statistics

Cuts = Mapping[str, Mapping[int, tuple[int, ...]]]  # parameter or buffer → axis → indices that stay
FOLD_DAMPING = 1e-6


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a layer.

    Attributes:
        inputs: Input channels (features of a linear layer) that stay; None for all.
        outputs: Output channels that stay; None for all.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything goes."""
        return self.inputs is not None or self.outputs is not None


def cuts_of(model: nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which indices stay of every tensor, given which units of each group stay.

    Args:
        model: The original.
        groups: Its channel groups.
        masks: For some groups by name, a mask over the units: True stays.
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
    """What the cuts leave of a layer."""
    own = cuts.get(f"{path}.weight" if path else "weight", {})
    out_axis, in_axis = _weight_axes(layer)

    def indices(axis: int) -> Tensor | None:
        return torch.tensor(own[axis]) if axis in own else None

    if getattr(layer, "groups", 1) > 1:  # depthwise: each channel reads itself
        return Kept(indices(0), indices(0))
    return Kept(indices(in_axis), indices(out_axis))


def _weight_axes(layer: nn.Module) -> tuple[int, int]:
    """Axes of the weight that are outputs and inputs; transformers' `Conv1D` stores in × out."""
    return (1, 0) if type(layer).__name__ == "Conv1D" else (0, 1)


def narrowed_geometry(geometry: Geometry, kept: Kept) -> Geometry:
    """The geometry of what stays of a layer."""
    inputs = geometry.inputs if kept.inputs is None else len(kept.inputs)
    outputs = geometry.outputs if kept.outputs is None else len(kept.outputs)
    groups = inputs if geometry.groups > 1 and kept else geometry.groups
    return replace(geometry, inputs=inputs, outputs=outputs, groups=groups)


def narrow_(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Cut the tensors of a model, and set the attributes of its layers that say their sizes.

    Args:
        model: Changed in place; parameters are replaced by new ones.
        cuts: What stays.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, value in list(table.items()):
                axes = cuts.get(prefix + name)
                if value is None or axes is None:
                    continue
                smaller = value.detach()
                for axis, indices in axes.items():
                    smaller = smaller.index_select(axis, torch.tensor(indices, device=value.device))
                smaller = smaller.contiguous().clone()
                if isinstance(value, nn.Parameter):
                    module._parameters[name] = nn.Parameter(smaller, requires_grad=value.requires_grad)
                else:
                    module._buffers[name] = smaller
        if any(name.rpartition(".")[0] == path for name in cuts):
            _resize(module)
    return model


def _resize(module: Any) -> None:
    """Make the attributes that say sizes agree with the tensors."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        out, inner = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = out // (module.out_channels // module.groups)
        module.in_channels, module.out_channels = inner * module.groups, out
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        kept = module.weight if module.running_mean is None else module.running_mean
        module.num_features = len(kept)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        module.nx, module.nf = module.weight.shape


def narrowed_site(site: Site, kept: Kept) -> Site:
    """A site of the narrowed model."""
    return replace(site, geometry=narrowed_geometry(site.geometry, kept))


def narrowed_sites(model: nn.Module, sites: Sites, narrow: nn.Module, cuts: Cuts, *, cost: Cost | None = None) -> Sites:
    """The sites of the narrowed model, with its cost.

    Args:
        model: The original.
        sites: Its sites.
        narrow: The narrowed model.
        cuts: What stays.
        cost: Of the narrowed model, as counted; None takes it by formula, attention of heads that are gone included.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    kept = tuple(narrowed_site(site, kept_of(site.path, modules[site.path], cuts)) for site in sites)
    cost = narrowed_cost(model, sites, cuts) if cost is None else cost
    return replace(sites, sites=kept, cost=cost, fingerprint=fingerprint(narrow))


def narrowed_cost(model: nn.Module, sites: Sites, cuts: Cuts) -> Cost:
    """Cost of the narrowed dense model by formula."""
    modules = dict(model.named_modules(remove_duplicate=False))
    cost = sites.cost
    own: set[str] = set()
    for site in sites:
        cost = cost - dense_cost(site) + dense_cost(narrowed_site(site, kept_of(site.path, modules[site.path], cuts)))
        own |= {f"{site.path}.{name}" if site.path else name for name in ("weight", "bias")}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = dict(model.named_parameters())
    for name, axes in cuts.items():
        if name in own or name not in tensors:
            continue
        value = tensors[name]
        left = prod(len(axes[axis]) if axis in axes else size for axis, size in enumerate(value.shape))
        gone = value.numel() - left
        cost = cost - Cost(gone if name in parameters else 0, 0, gone * value.element_size())
    return cost


def narrowed_statistics(stats: Statistics, model: nn.Module, sites: Sites, cuts: Cuts, print_of: str) -> Statistics:
    """The statistics of what stays.

    Args:
        stats: Of the original.
        model: The original.
        sites: Its sites.
        cuts: What stays.
        print_of: Fingerprint of the narrowed model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    result = {}
    for site in sites:
        kept = kept_of(site.path, modules[site.path], cuts)
        features, outputs = features_of(site.geometry, kept), kept.outputs
        depthwise = site.geometry.groups > 1
        own = {}
        for name, statistic in stats.sites.get(site.path, {}).items():
            total = statistic.total
            if total is not None and kept and depthwise and kept.outputs is not None:
                total = total[kept.outputs.to(total.device)]
            elif total is not None:
                index = features if name.startswith("input") else outputs
                if index is not None:
                    place = index.to(total.device)
                    total = total[:, place] if total.ndim == 2 else total[:, place][:, :, place]
            own[name] = type(statistic)(statistic.count, total)
        result[site.path] = own
    return Statistics(result, dict(stats.manifest), print_of)


def features_of(geometry: Geometry, kept: Kept) -> Tensor | None:
    """Places in a flattened patch `in·k…` of the input channels that stay; None for all."""
    if kept.inputs is None or geometry.groups > 1:
        return None
    taps = geometry.features * geometry.groups // geometry.inputs
    return (kept.inputs[:, None] * taps + torch.arange(taps)).flatten()


def fold_(
    model: nn.Module,
    sites: Sites,
    cuts: Cuts,
    stats: Statistics,
    norms: Mapping[str, str | None],
    *,
    damping: float = FOLD_DAMPING,
) -> None:
    """Fold into every layer that reads removed channels what the others say of them.

    `W ← W A_{:J} A_JJ⁻¹` is the least-squares weight on the channels `J` that stay, in the metric of the layer's own
    inputs: covariances where a bias, or a batch norm right behind, takes up the mean; raw moments otherwise. The
    columns of removed channels become zero, so that cutting them afterwards changes nothing.

    Args:
        model: Changed in place; not yet cut.
        sites: Of the model.
        cuts: What stays.
        stats: Of the original, with input Grams and means.
        norms: Running mean of the batch norm that can absorb a layer's bias, by path of the layer.
        damping: Relative damping of `A_JJ`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for site in sites:
        layer = modules[site.path]
        kept = kept_of(site.path, layer, cuts)
        features, adapter = features_of(site.geometry, kept), adapter_for(layer)
        if features is None or adapter is None:
            continue
        norm = None if site.geometry.bias else norms.get(site.path)
        moments = stats.moments(site, 0)
        if moments.gram is None or moments.mean is None:
            raise ValueError(f"{site.path} has no input moments")
        gram = moments.gram
        if site.geometry.bias or norm is not None:
            gram = gram - torch.outer(moments.mean, moments.mean)
        old = widen(adapter.canonical(layer))[0].flatten(1)
        new = folded(old, gram.to(old), features, damping=damping)
        with torch.no_grad():
            canonical = adapter.canonical(layer)
            canonical.copy_(new.reshape(canonical.shape))
            shift = (old - new) @ moments.mean.to(old)
            if site.geometry.bias:
                tensor(layer, "bias").add_(shift.to(canonical.dtype))
            elif norm is not None:
                buffers[norm].sub_(shift.to(buffers[norm].dtype))


def folded(weight: Tensor, gram: Tensor, features: Tensor, *, damping: float = FOLD_DAMPING) -> Tensor:
    """`W A_{:J} (A_JJ + λI)⁻¹` in the columns `J`, zero elsewhere.

    Solved for the change, so that a Gram of zeros leaves the weight of the kept columns as it is.

    Args:
        weight: `W`, shape (out, n).
        gram: `A`, shape (n, n).
        features: `J`.
        damping: Relative.
    """
    places = features.to(weight.device)
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[places] = False
    inner = cholesky(damped_gram(gram[places][:, places], damping=damping))
    change = torch.cholesky_solve((weight[:, gone] @ gram[gone][:, places]).mT, inner).mT
    result = torch.zeros_like(weight)
    result[:, places] = weight[:, places] + change
    return result

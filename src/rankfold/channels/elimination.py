"""Statistics + channel groups → the order in which units go, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankfold.channels.groups import ChannelGroup, Units
from rankfold.channels.narrowing import features
from rankfold.data.draws import generator
from rankfold.decompositions import Interpolative, output_root
from rankfold.layers import adapter_for
from rankfold.linalg.interpolative import backward_elimination, pivoted_cholesky, strong_rrqr
from rankfold.linalg.precision import widen
from rankfold.linalg.whitening import cholesky, damped_gram
from rankfold.sites.site import Site, Sites
from rankfold.statistics import Statistics
from rankfold.statistics._coherence import CoherenceCurve, coherences

USUAL = 0.1  # relative error at which a reader's coherence is taken: what a removal usually costs it


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Cost of removing the units of a group.

    Attributes:
        group: The group.
        order: Units in the order in which they go, shape (units,).
        errors: Summed squared error of the readers, refitted, with the first m units gone, shape (units + 1,), in the
            metric of their gradient Grams.
        relative: Errors likewise, each reader's relative to the energy of its own output; None unless asked for.
        gram: Second moment of the units, shape (units, units), where the rule exchanges pivots.
        remainders: Values `|R_kk|` of the pivoted QR of the units' activations, shape (units,); None unless asked for.
    """

    group: ChannelGroup
    order: Tensor
    errors: Tensor
    relative: Tensor | None = None
    gram: Tensor | None = None
    remainders: Tensor | None = None

    def scaled(self, factor: float) -> RemovalCurve:
        """The curve with its errors multiplied by a factor."""
        return replace(self, errors=self.errors * factor)

    def kept(self, count: int, method: Interpolative) -> tuple[int, ...]:
        """The units that stay when `count` of them do."""
        chosen = self.order[len(self.order) - count :]
        if self.gram is not None:
            chosen = strong_rrqr(self.gram, chosen)
        return tuple(sorted(chosen.tolist()))


def removal_curves(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    stats: Statistics,
    *,
    sites: Sites,
    method: Interpolative,
    norms: Mapping[str, str | None],
    remainders: bool = False,
    relative: bool = False,
    seed: int = 0,
) -> list[RemovalCurve]:
    """Order of removal by a method's rule, and its cost to the refitted readers, for every group.

    The error of a reader is `tr(G D A Dᵀ)`, `G` the Gram of its output gradients where they were collected, so errors
    of different groups can be summed; without them it is relative to the energy of the reader's output.

    Args:
        model: The original model.
        groups: Channel groups of the model.
        stats: Statistics of the model, with input Grams and means.
        sites: Sites of the model, from `find_sites`.
        method: Method whose rule sets the order.
        norms: Name of the running mean of the batch norm that can absorb a layer's bias, by path of the layer.
        remainders: True if the curves hold the `|R_kk|` of the pivoted QR, whatever the rule.
        relative: True if the curves hold relative errors.
        seed: Seed of the rule "random".

    Raises:
        DataError: The input Grams were not collected.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    told = coherences(stats.sites)
    curves = []
    for number, group in enumerate(groups):
        readers = [
            _reader(sites.at(path), modules[path], units, stats, told.get(path), centred=norms.get(path) is not None)
            for path, units in group.read.items()
        ]
        gram = lengths = order = None
        by_pivots = method.rule in ("pivoted-qr", "strong-rrqr")
        if by_pivots or remainders:
            raw = [_raw(sites.at(path), units, group.units, stats) for path, units in group.read.items()]
            gram = torch.stack(raw).sum(0)
            pivots, lengths = pivoted_cholesky(gram)
            order = pivots.flip(0) if by_pivots else None
        if method.rule == "magnitude":
            order = _magnitudes(group, modules).argsort(stable=True)
        elif method.rule == "random":
            order = torch.randperm(group.units, generator=generator(seed, number))
        order, errors = backward_elimination([weighted for weighted, _ in readers], order=order)
        own = backward_elimination([plain for _, plain in readers], order=order)[1] if relative else None
        exchanged = gram if method.rule == "strong-rrqr" else None
        curves.append(RemovalCurve(group, order, errors, own, exchanged, lengths if remainders else None))
    return curves


def even(group: ChannelGroup) -> bool:
    """Whether each reader reads equally many channels of every unit, as elimination needs."""
    for units in group.read.values():
        counts = torch.bincount(torch.tensor([u for u in units if u >= 0]), minlength=group.units)
        if int(counts.min()) != int(counts.max()):
            return False
    return True


def _places(units: Units, taps: int) -> tuple[Tensor, Tensor]:
    """Features of a patch that belong to units, unit after unit, and those that belong to none."""
    own = torch.tensor(units)
    order = torch.argsort(own, stable=True)
    inside = order[own[order] >= 0]
    return features(inside, taps), features(torch.nonzero(own < 0).flatten(), taps)


Reader = tuple[Tensor, Tensor]  # K (C, b, C, b) and W (out, C, b), as `backward_elimination` takes them


def _reader(
    site: Site, layer: nn.Module, units: Units, stats: Statistics, coherence: CoherenceCurve | None, *, centred: bool
) -> tuple[Reader, Reader]:
    """A reader's inputs and weight, unit by unit: weighted by its gradient Gram, and relative to its energy."""
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{site.path} has no adapter")
    moments = replace(stats.moments(site, 0), bias=centred or site.geometry.bias)
    weight = widen(adapter.canonical(layer))[0].flatten(1)
    gram = moments.metric(site.path).to(weight)
    inside, outside = _places(units, weight.shape[1] // len(units))
    inside, outside = inside.to(weight.device), outside.to(weight.device)
    energy = (weight * (weight @ gram)).sum()
    relative = weight / torch.where(energy > 0, energy, 1.0).sqrt()
    weighted = relative
    if moments.gradient_gram is not None:
        weighted = output_root(moments.gradient_gram.to(weight)) @ weight
        if coherence is not None:
            weighted = weighted * coherence.at(weight.new_tensor(USUAL)).sqrt()
    own = gram[inside][:, inside]
    if len(outside):  # what stays anyway takes its part of the correction: the Schur complement is what is left
        inner = cholesky(damped_gram(gram[outside][:, outside], damping=1e-6))
        crossed = gram[outside][:, inside]
        own = own - crossed.mT @ torch.cholesky_solve(crossed, inner)
    count = max(units) + 1
    width = len(inside) // count
    own = own.reshape(count, width, count, width)
    first, second = (each[:, inside].reshape(-1, count, width) for each in (weighted, relative))
    return (own, first), (own, second)


def _raw(site: Site, units: Units, count: int, stats: Statistics) -> Tensor:
    """Second moment of the units as one reader sees them: summed over the taps and the channels of a unit."""
    gram = replace(stats.moments(site, 0), bias=False).metric(site.path)
    inside, _ = _places(units, len(gram) // len(units))
    own = widen(gram[inside][:, inside])
    width = len(inside) // count
    return torch.diagonal(own.reshape(count, width, count, width), dim1=1, dim2=3).sum(-1)


def _magnitudes(group: ChannelGroup, modules: dict[str, nn.Module]) -> Tensor:
    """Squared norm of the rows that make each unit."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for path, units in group.made.items():
        adapter = adapter_for(modules[path])
        if adapter is None:
            raise TypeError(f"{path} has no adapter")
        rows = widen(adapter.canonical(modules[path])).flatten(0, 1).flatten(1).square().sum(1).cpu()
        own = torch.tensor(units)
        total.index_add_(0, own[own >= 0], rows[own >= 0].double())
    return total

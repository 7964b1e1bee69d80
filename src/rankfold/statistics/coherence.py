"""Whether a site's errors at its positions add up or cancel: one number a site, by which its gradient Gram is scaled.

`tr(G D A Dᵀ)` takes the errors of a sample's positions for independent. In front of a pooling layer they are not: what
is common to all of them passes, what differs is averaged away. The true value of one change `D` tells how much.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rankfold.decompositions import WhitenedSVD, factorise
from rankfold.decompositions._base import judged_energy
from rankfold.decompositions.weighting import damped_gradients
from rankfold.graph.sites import Site
from rankfold.layers import adapter_for
from rankfold.linalg.precision import widen
from rankfold.statistics.collect import rows_of
from rankfold.statistics.store import Statistics

SHARE = 0.6  # of the rank at which two factors are as large as the layer: what cuts usually leave


@dataclass(eq=False)
class Change:
    """A change of one site, and what it is predicted to cost.

    Attributes:
        layer: Computes `D (x − x̄)`: the layer's own kind, with the change for a weight.
        predicted: `tr(G D A Dᵀ)` over all groups.
        squares: Sum over samples of `⟨gradient, D (x − x̄)⟩²`, each summed over positions and calls first.
        samples: How many samples.
    """

    layer: nn.Module
    predicted: float
    squares: float = 0.0
    samples: int = 0

    @property
    def coherence(self) -> float:
        """True over predicted; 1 where there is nothing to compare."""
        if not self.predicted > 0 or not self.squares > 0 or not self.samples:
            return 1.0
        return self.squares / self.samples / self.predicted


def change_of(site: Site, layer: nn.Module, stats: Statistics) -> Change | None:
    """The change that a cut to a usual rank would make; the loss of the whole weight where there is no rank to cut.

    Args:
        site: The site.
        layer: Its layer.
        stats: With input moments and the gradient Gram; None is returned where they were not collected.
    """
    own = stats.sites.get(site.path, {})
    adapter = adapter_for(layer)
    if adapter is None or not all(name in own for name in ("input-gram", "input-mean", "gradient-gram")):
        return None
    weights = widen(adapter.canonical(layer))
    out, inputs = weights.shape[1], weights[0, 0].numel()
    rank = max(1, round(SHARE * out * inputs / (out + inputs)))
    changes, shifts, predicted = [], [], 0.0
    for group, weight in enumerate(weights):
        moments = stats.moments(site, group)
        flat = weight.flatten(1)
        change = flat
        if min(out, inputs) > 1:
            change = flat - factorise(WhitenedSVD(), weight, rank, moments).reconstruct().flatten(1)
        judge = stats.moments(site, group, shrink=False)
        gradients, mean = judge.gradient_gram, judge.mean
        if gradients is None or mean is None:
            return None
        damped = replace(judge, gradient_gram=damped_gradients(gradients))
        predicted += float(judged_energy(change, damped, site.path))
        changes.append(change.reshape(weight.shape))
        shifts.append(change @ mean.to(flat))
    changed = copy.deepcopy(layer).requires_grad_(False)
    with torch.no_grad():
        canonical = adapter.canonical(changed)
        canonical.copy_(torch.stack(changes).reshape(canonical.shape))
        bias = adapter.bias(changed)
        if bias is not None:
            bias.copy_(-torch.cat(shifts).to(bias))
    return Change(changed, predicted)


def add_samples(
    changes: dict[str, Change],
    reached: list[tuple[Site, nn.Module, Tensor, Tensor]],
    gradients: list[Tensor | None],
    samples: int,
) -> None:
    """Add the samples of one batch.

    Args:
        changes: By path; changed.
        reached: Every call of a site: the site, its layer, what the layer was given, and its output.
        gradients: Of a random projection of the network's outputs, by each of those outputs.
        samples: In the batch.
    """
    totals: dict[str, Tensor] = {}
    for (site, layer, inputs, _), gradient in zip(reached, gradients, strict=True):
        change, adapter = changes.get(site.path), adapter_for(layer)
        if change is None or adapter is None or gradient is None or rows_of(adapter, layer, inputs) % samples:
            continue
        felt = (change.layer(inputs.detach()) * gradient).double().reshape(samples, -1).sum(1)
        totals[site.path] = totals.get(site.path, 0) + felt
    for path, total in totals.items():
        changes[path].squares += float(total.square().sum())
        changes[path].samples += samples

"""What the loss of a branch is predicted to cost."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from rankfold.layers import adapter_for
from rankfold.linalg.precision import widen
from rankfold.sites.site import Site
from rankfold.statistics import Statistics
from rankfold.statistics._coherence import CoherenceCurve


def loss_of(site: Site, layer: nn.Module, stats: Statistics, coherence: CoherenceCurve | None) -> float:
    """Predicted error of a constant in the place of a layer's output, `tr(G W Σ Wᵀ)` with the covariance `Σ`.

    Args:
        site: The last layer of a branch.
        layer: The layer itself.
        stats: Statistics of the model. Without gradients `G` is the identity.
        coherence: How strongly its errors add up within a sample, where that was measured.

    Returns:
        The error; infinity for a layer of which no inputs were seen.
    """
    adapter = adapter_for(layer)
    if adapter is None or "input-gram" not in stats.sites.get(site.path, {}):
        return math.inf
    total = 0.0
    for group, weight in enumerate(widen(adapter.canonical(layer))):
        moments = stats.moments(site, group)
        flat = weight.flatten(1)
        outputs = flat @ replace(moments, bias=True).metric(site.path).to(flat) @ flat.mT
        felt = outputs.trace() if moments.gradient_gram is None else (moments.gradient_gram.to(outputs) * outputs).sum()
        total += float(felt)
    if coherence is None:
        return total
    return total * float(coherence.at(weight.new_ones(1)))

"""By how much a curve's errors are off, at every error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankfold.registry import register
from rankfold.statistics._base import Statistic

SMALLEST = 1e-6  # relative errors below it are not told apart


@register("coherence")
@dataclass
class Coherence(Statistic):
    """For every rank r from 0, summed over samples: the squared change of the output, and the one that is predicted.

    Shape (1, 2, k + 1). `f_r = Σ_s (Σ ⟨g, D_r (x − x̄)⟩)²`, `g` the gradient of a random projection of the network's
    outputs, `D_r` what the whitened SVD to rank r leaves, each sample's positions and calls summed before they are
    squared; and `p_r = Σ_s Σ gᵀ D_r A D_rᵀ g`. The count is in samples.
    """

    name = "coherence"
    reads_outputs = True
    of_channels = False

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """Needs gradients, and so a backward pass: `collect_gradients` adds it."""
        raise TypeError("coherence is no sum over positions")

    def at(self, errors: Tensor) -> Tensor:
        """`f/p` where the curve of the whitened SVD has some relative errors, interpolated in logarithms.

        Args:
            errors: Relative errors, any shape.
        """
        felt, predicted = self.mean()[0].cpu()
        usable = (felt > 0) & (predicted > predicted[0] * SMALLEST)
        if not bool(usable.any()):
            return torch.ones_like(errors)
        felt, predicted = felt[usable].flip(0), predicted[usable].flip(0)
        levels, ratios = (predicted / predicted[-1]).log(), (felt / predicted).log()
        levels = levels.cummax(0).values  # by chance, cross terms of a rank more may be predicted to cost more
        wanted = errors.double().clamp_min(SMALLEST).log().cpu()
        return torch.as_tensor(np.interp(wanted.numpy(), levels.numpy(), ratios.numpy())).exp().to(errors)

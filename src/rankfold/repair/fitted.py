"""A map that was fitted for a site, before it is a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.factors import Factors
from rankfold.repair.moments import PairMoments


@dataclass(eq=False)
class Fitted:
    """A map for every group of a site: its factors, or its dense weight, and a bias over all groups or None."""

    weights: list[Tensor]
    factors: list[Factors]
    bias: Tensor | None

    def error(self, moments: PairMoments) -> float:
        """Mean squared error over all groups."""
        rows = self.weights[0].shape[0]
        total = 0.0
        for group, weight in enumerate(self.weights):
            bias = None if self.bias is None else self.bias[group * rows : (group + 1) * rows]
            total += moments.error(group, weight, bias)
        return total

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight (groups, out, n) and bias (groups, 1, out), 0 where there is none."""
        weight = torch.stack(self.weights)
        bias = weight.new_zeros(weight.shape[:2]) if self.bias is None else self.bias.to(weight)
        return weight, bias.reshape(len(weight), 1, -1)

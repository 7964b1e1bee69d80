"""Sensitivity of the network's output to a site's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rankfold.linalg.precision import gram
from rankfold.registry import register
from rankfold.statistics._base import Statistic


@register("gradient-gram")
@dataclass
class GradientGram(Statistic):
    """`Σ g gᵀ` over positions, `g` the gradient of a random projection of the network's output. (groups, out, out).

    With `v ~ N(0, I)` and `g = Jᵀv`, `E[g gᵀ] = JᵀJ`: the Gauss–Newton matrix of the squared error of the outputs. Its
    count is in samples, so that `mean` sums over the positions of a sample and averages over samples.
    """

    name = "gradient-gram"
    reads_outputs = True
    halved = True

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """`GᵀG` a group; `outputs` are the gradients."""
        if outputs is None:
            raise ValueError("gradient-gram needs the gradients")
        return gram(outputs)

"""How the loss changes with a site's weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.registry import register
from rankfold.statistics._base import Statistic


@register("loss-gradient")
@dataclass
class LossGradient(Statistic):
    """`Σ ∂ℓ/∂W` over samples, `W` the canonical weight with its kernel flattened. Shape (groups, out, in·k…).

    Its count is in samples, so that `mean` is the gradient of the mean loss.
    """

    name = "loss-gradient"
    reads_outputs = True
    of_channels = False

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """`Σ g xᵀ` a group; `outputs` are the gradients of the loss there."""
        if outputs is None:
            raise ValueError("loss-gradient needs the gradients")
        summed: Tensor = torch.einsum("gpo,gpn->gon", outputs.double(), inputs.double())
        return summed

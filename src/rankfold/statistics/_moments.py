"""First and second moments of a site's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold.linalg.precision import gram, total
from rankfold.registry import register
from rankfold.statistics._base import Statistic

SAMPLE_GROUPS = 32


@register("input-gram")
@dataclass
class InputGram(Statistic):
    """`Σ x xᵀ` over positions; for a convolution `x` is the flattened patch. Shape (groups, in·k…, in·k…).

    Products are taken in the activations' dtype inside a chunk, sums in float64.
    """

    name = "input-gram"
    halved = True

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """`XᵀX` a group."""
        return gram(inputs)


@register("input-mean")
@dataclass
class InputMean(Statistic):
    """`Σ x` over positions. Shape (groups, in·k…)."""

    name = "input-mean"
    halved = True

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """Column sums a group."""
        return total(inputs)


@register("input-groups")
@dataclass
class InputGroups(Statistic):
    """`Σ x` and the number of positions, in groups of the samples. Shape (groups, 32, in·k… + 1).

    What is fed at once belongs to one group, in turn; the last column counts.
    """

    name = "input-groups"
    of_channels = False

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """Column sums and the count a group, in the row of this group of samples."""
        sums = total(inputs)
        counted = torch.cat([sums, sums.new_full((len(sums), 1), float(inputs.shape[1]))], 1)
        result = sums.new_zeros(len(sums), SAMPLE_GROUPS, counted.shape[1])
        fed = getattr(self, "_fed", 0)
        self._fed = fed + 1
        result[:, fed % SAMPLE_GROUPS] = counted
        return result

    def narrowed(self, kept: Tensor | None, *, groups: bool) -> InputGroups:
        """The same for the features, or the groups of a depthwise layer, that stay; the count stays in any case."""
        if self.total is None or kept is None:
            return self
        place = kept.to(self.total.device)
        left = self.total[place] if groups else torch.cat([self.total[..., place], self.total[..., -1:]], -1)
        return InputGroups(self.count, left)


@register("output-gram")
@dataclass
class OutputGram(Statistic):
    """`Σ y yᵀ` over positions. Shape (groups, out, out)."""

    name = "output-gram"
    reads_outputs = True

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """`YᵀY` a group."""
        if outputs is None:
            raise ValueError("output-gram needs the outputs")
        return gram(outputs)

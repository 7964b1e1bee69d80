"""First and second moments of a site's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rankfold.linalg.precision import gram, total
from rankfold.registry import register
from rankfold.statistics._base import Statistic


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

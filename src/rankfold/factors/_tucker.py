"""Factors of a core between matrices on the channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rankfold.factors._base import Factors


@dataclass(frozen=True, eq=False)
class TuckerFactors(Factors):
    """`1×1 → a`, `k×k → b`, `1×1 → out`: `W[o, i, k] = Σ output[o, b] core[b, a, k] input[a, i]`.

    Attributes:
        output: Last stage, shape (out, b, 1…).
        core: Middle stage, shape (b, a, kernel…).
        input: First stage, shape (a, in, 1…).
    """

    output: Tensor
    core: Tensor
    input: Tensor
    form = "tucker"

    @property
    def ranks(self) -> tuple[int, int]:
        """`(a, b)`."""
        return self.core.shape[1], self.core.shape[0]

    def stages(self) -> tuple[Tensor, Tensor, Tensor]:
        """`input`, `core`, `output`."""
        return self.input, self.core, self.output

    def mixed(self, matrix: Tensor) -> Self:
        """`output` mixed along its outputs."""
        return replace(self, output=torch.einsum("po,ob...->pb...", matrix.to(self.output), self.output))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        outer, inner = self.output.flatten(1), self.input.flatten(1)
        return torch.einsum("ob,ba...,ai->oi...", outer, self.core, inner)

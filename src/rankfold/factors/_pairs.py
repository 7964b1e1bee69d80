"""Factors of two stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.factors._base import Factors


@dataclass(frozen=True, eq=False)
class _PairFactors(Factors):
    """Two stages: `W[o, i, k] = Σ_r left[o, r, k_left] · right[r, i, k_right]`, kernel axes of size 1 broadcast.

    Attributes:
        left: Second stage, shape (out, r, kernel…).
        right: First stage, shape (r, in, kernel…).
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        agree = self.left.ndim == self.right.ndim >= 2 and self.left.shape[1] == self.right.shape[0]
        if not agree or any(a != 1 and b != 1 for a, b in zip(self.left.shape[2:], self.right.shape[2:], strict=True)):
            raise OptionError(
                type(self).__name__,
                law="left is out × r × k, right r × in × k, a kernel axis in one of the two",
                got=f"{tuple(self.left.shape)} and {tuple(self.right.shape)}",
                cure="check the shapes",
            )

    @property
    def ranks(self) -> int:
        """The inner width r."""
        return self.right.shape[0]

    def stages(self) -> tuple[Tensor, Tensor]:
        """`right`, then `left`."""
        return self.right, self.left

    def mixed(self, matrix: Tensor) -> Self:
        """`left` mixed along its outputs."""
        return replace(self, left=torch.einsum("po,or...->pr...", matrix.to(self.left), self.left))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        return torch.einsum("or...,ri...->oi...", self.left, self.right)


class MatrixFactors(_PairFactors):
    """`k×k → r`, then `1×1 → out`: the low-rank form of the `out × (in·k·k)` matrix (and of a linear layer)."""

    form = "matrix"


class BiasedMatrixFactors(MatrixFactors):
    """`MatrixFactors` of a layer that has a bias afterwards, whether it had one before or not."""

    form = "biased-matrix"


class MirroredFactors(_PairFactors):
    """`1×1 → r`, then `k×k → out`: the low-rank form of the `(out·k·k) × in` matrix."""

    form = "mirrored"


class SpatialFactors(_PairFactors):
    """`k×1 → r`, then `1×k → out`: the low-rank form of the `(out·kw) × (in·kh)` matrix of a 2-d convolution."""

    form = "spatial"

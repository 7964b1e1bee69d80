"""Frozen tensors of one factorisation, in the order in which they are applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeAlias

import torch
from torch import Tensor

from rankfold.errors import OptionError

Rank: TypeAlias = int | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Factors(ABC):
    """Factors of one canonical weight `out × in × kernel…`, as a decomposition returns them."""

    form: ClassVar[str]

    @property
    @abstractmethod
    def ranks(self) -> Rank:
        """Inner widths: an int for two stages, a tuple for more."""

    @abstractmethod
    def stages(self) -> tuple[Tensor, ...]:
        """The weights of the layers that replace the dense one, first applied first, each `out × in × kernel…`."""

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """The dense canonical weight these factors multiply out to."""

    @abstractmethod
    def mixed(self, matrix: Tensor) -> Factors:
        """Factors of `matrix @ W`: the last stage's outputs mixed by a matrix of shape (out, out)."""

    @property
    def n_params(self) -> int:
        """Number of elements over all stages."""
        return sum(stage.numel() for stage in self.stages())


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


class MirroredFactors(_PairFactors):
    """`1×1 → r`, then `k×k → out`: the low-rank form of the `(out·k·k) × in` matrix."""

    form = "mirrored"


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


class SpatialFactors(_PairFactors):
    """`k×1 → r`, then `1×k → out`: the low-rank form of the `(out·kw) × (in·kh)` matrix of a 2-d convolution."""

    form = "spatial"

"""Frozen tensors of one factorisation, in the order in which they are applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

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

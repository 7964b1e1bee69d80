"""The axis on which statistics plug in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


@dataclass
class Statistic(ABC):
    """A sum over calibration positions at one site, and how many positions it is over.

    A subclass says what is summed; merging, saving and averaging follow. `merge(a, b)` equals collecting over both.

    Attributes:
        count: Positions seen, per group.
        total: The sum, groups first, in the work dtype; None before the first update.
    """

    name: ClassVar[str]
    reads_outputs: ClassVar[bool] = False
    count: int = 0
    total: Tensor | None = field(default=None, repr=False)

    @abstractmethod
    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """What a chunk of positions adds.

        Args:
            inputs: Flattened inputs, shape (groups, positions, in·k…).
            outputs: Outputs in the same order, shape (groups, positions, out), where `reads_outputs`.

        Returns:
            A sum over the positions, groups first.
        """

    def update(self, inputs: Tensor, outputs: Tensor | None = None) -> None:
        """Add a chunk of positions; see `summand` for the shapes."""
        self.add(self.summand(inputs, outputs), inputs.shape[1])

    def add(self, total: Tensor, count: int) -> None:
        """Add a sum over `count` positions."""
        self.total = total if self.total is None else self.total + total.to(self.total.device)
        self.count += count

    def mean(self) -> Tensor:
        """The sum divided by the number of positions."""
        if self.total is None:
            raise ValueError(f"{self.name} has seen no position")
        return self.total / self.count


def merge(first: Statistic, second: Statistic) -> Statistic:
    """The statistic over the positions of both.

    Raises:
        TypeError: They are of two kinds.
    """
    if type(first) is not type(second):
        raise TypeError(f"cannot merge {first.name} with {second.name}")
    merged = type(first)(first.count, first.total)
    if second.total is not None:
        merged.add(second.total, second.count)
    return merged

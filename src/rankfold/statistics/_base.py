"""The axis on which statistics plug in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


@dataclass
class Statistic(ABC):
    """A sum over calibration positions at one site, and the number of positions.

    A subclass defines the summand; merging, saving and averaging follow. `merge(a, b)` equals collecting over both.
    A statistic that is `halved` also keeps the sum over the first half of the *samples*: what is fitted on one half
    can then be judged on the other.

    Attributes:
        count: Number of positions seen, per group.
        total: Sum over the positions, groups first, in the work dtype; None before the first update.
        first_count: Number of positions of the first half of the samples.
        first: Sum over these, of the shape of `total`; None before the first of them, or where it is not `halved`.
    """

    name: ClassVar[str]
    reads_outputs: ClassVar[bool] = False
    halved: ClassVar[bool] = False
    of_channels: ClassVar[bool] = True  # whether axes of the sum are channels, of which some may go
    count: int = 0
    total: Tensor | None = field(default=None, repr=False)
    first_count: int = 0
    first: Tensor | None = field(default=None, repr=False)

    @abstractmethod
    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """The summand of a chunk of positions.

        Args:
            inputs: Flattened inputs, shape (groups, positions, in·k…).
            outputs: Outputs in the same order, shape (groups, positions, out), where `reads_outputs`.

        Returns:
            A sum over the positions, groups first.
        """

    @property
    def has_halves(self) -> bool:
        """Whether both halves of the samples were seen, and are distinguished."""
        return self.first is not None and 0 < self.first_count < self.count

    def update(self, inputs: Tensor, outputs: Tensor | None = None, *, first: bool = False) -> None:
        """Add a chunk of positions, all of one half of the samples; see `summand` for the shapes."""
        self.add(self.summand(inputs, outputs), inputs.shape[1], first=first)

    def add(self, total: Tensor, count: int, *, first: bool = False) -> None:
        """Add a sum over `count` positions, all of one half of the samples."""
        self.total = total if self.total is None else self.total + total.to(self.total.device)
        self.count += count
        if first and self.halved:
            self.first = total if self.first is None else self.first + total.to(self.first.device)
            self.first_count += count

    def mean(self, half: int | None = None, *, group: int | None = None) -> Tensor:
        """The sum divided by the number of positions.

        Args:
            half: Index of a half of the samples, 0 or 1; None for all.
            group: Index of the group; None is all of them. (A depthwise convolution has a thousand: of the mean of all
                no part is kept without the rest.)

        Raises:
            ValueError: No position was seen, or the halves are not distinguished.
        """
        if self.total is None:
            raise ValueError(f"{self.name} has seen no position")
        total = self.total if group is None else self.total[group]
        if half is None:
            return total / self.count
        if self.first is None or not self.has_halves:
            raise ValueError(f"{self.name} does not tell the halves of the samples apart")
        first = self.first if group is None else self.first[group]
        if half == 0:
            return first / self.first_count
        return (total - first) / (self.count - self.first_count)


def merge(first: Statistic, second: Statistic) -> Statistic:
    """The statistic over the positions of both.

    Raises:
        TypeError: The statistics are of two kinds.
    """
    if type(first) is not type(second):
        raise TypeError(f"cannot merge {first.name} with {second.name}")
    merged = type(first)(first.count, first.total, first.first_count, first.first)
    if second.total is not None:
        merged.add(second.total, second.count)
    if second.first is not None:
        merged.first = second.first if merged.first is None else merged.first + second.first.to(merged.first.device)
        merged.first_count += second.first_count
    return merged

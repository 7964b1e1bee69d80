"""Channel coordinates: numbers for channels, which of them go together, and which must stay."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

STAYS = -1  # number of an element that is no channel of any layer


@dataclass(eq=False)
class Flow:
    """Result of the walk: numbers for the channels, which of them go together, and which must stay.

    Attributes:
        made: Numbers of the output channels of every layer that makes channels.
        read: Numbers of the input channels (features of a linear layer) of every layer that reads channels.
        carried: Numbers of every parameter or buffer that goes along with channels: name → axis → numbers.
        attended: Pairs, one for every attention: the number of each head, and the MACs of a head per sample.
        mixed: Text naming the operator, for every number that an operator mixes with others, so that all go together.
    """

    made: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    carried: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    attended: list[tuple[Tensor, int]] = field(default_factory=list)
    mixed: dict[int, str] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)
    _frozen: dict[int, str] = field(default_factory=dict)

    def root(self, number: int) -> int:
        """The number that stands for all that must go together with this one."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def roots(self, numbers: Tensor) -> Tensor:
        """Each number replaced by the one that stands for it."""
        own, places = torch.unique(numbers, return_inverse=True)
        return torch.tensor([n if n == STAYS else self.root(n) for n in own.tolist()])[places]

    def why_frozen(self, number: int) -> str | None:
        """Why a channel must stay; None where it may go."""
        return self._frozen.get(self.root(number))

    def fresh(self, count: int) -> Tensor:
        """New numbers."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def freeze(self, numbers: Tensor | None, reason: str) -> None:
        """Record that channels must stay; the first reason is kept."""
        for number in [] if numbers is None else torch.unique(numbers).tolist():
            if number != STAYS:
                self._frozen.setdefault(self.root(number), reason)

    def unite(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Record that channels at the same places must go together; a channel that meets none is frozen."""
        one, other = broadcast(first, second)
        for a, b in sorted(set(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))):
            if a == STAYS or b == STAYS:
                self.freeze(torch.tensor([max(a, b)]), reason)
                continue
            a, b = self.root(a), self.root(b)
            if a == b:
                continue
            self._parents[max(a, b)] = min(a, b)
            why = self._frozen.get(a) or self._frozen.get(b)
            if why is not None:
                self._frozen[min(a, b)] = why


def broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, expanded to their common shape."""
    shape = (first + second).shape
    return first.expand(shape), second.expand(shape)


def along(numbers: Tensor, axis: int, rank: int) -> Tensor:
    """Numbers of one axis, reshaped to broadcast against a tensor of some rank."""
    return numbers.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def spread(numbers: Tensor, axis: int, size: int) -> Tensor:
    """Numbers with one axis expanded to its full size, where they may be the same all along it."""
    return numbers.expand([size if i == axis % numbers.ndim else -1 for i in range(numbers.ndim)])


def compressed(numbers: Tensor) -> Tensor | None:
    """Numbers with every axis along which they do not change cut to 1; None where there is no channel."""
    for axis, size in enumerate(numbers.shape):
        if size > 1:
            first = numbers.narrow(axis, 0, 1)
            if bool((numbers == first).all()):
                numbers = first
    return None if bool((numbers == STAYS).all()) else numbers.contiguous()

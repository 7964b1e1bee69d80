"""Tiny networks and data for the tests of the command line, named there as `cli_networks:NAME`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(left) + right))


def encoder() -> nn.Module:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(16, 6))


def sequences() -> list[Tensor]:
    return [torch.randn(20, 5, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


def tiny() -> nn.Module:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Tiny()


def random_tiny() -> nn.Module:
    """Weights from the global generator."""
    return Tiny()


def keyword() -> nn.Module:
    return Keyword()


def talkative() -> nn.Module:
    print("a factory that prints")
    return tiny()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 10, 10, generator=generator) for _ in range(4)]


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.arange(len(batch)) % 6) for batch in images()]


def wrong_shape() -> list[Tensor]:
    return [torch.zeros(2, 5, 10, 10)]


def stream() -> Iterator[Tensor]:
    yield from images()


def failing() -> nn.Module:
    raise KeyError("no such checkpoint")


def number() -> int:
    return 3


def with_argument(width: int) -> nn.Module:
    return nn.Linear(width, width)


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


module = tiny()

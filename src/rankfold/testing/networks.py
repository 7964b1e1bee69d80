"""Small untrained networks: one of every kind of part, and random ones from a seed."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from rankfold.testing.matrices import normal


class Residual(nn.Module):
    """`x + body(x)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = inputs + self.body(inputs)
        return result


class Twice(nn.Module):
    """One module applied twice: `f(f(x))`."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, inputs: Tensor) -> Tensor:
        """The result of both applications."""
        result: Tensor = self.shared(self.shared(inputs))
        return result


def toy_network(*, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A convolutional network with a part of every kind, and 12 inputs for it.

    Returns:
        The network in eval mode (3 × 10 × 9 images to 10 logits), and the inputs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            Residual(nn.Sequential(nn.Conv2d(12, 12, 3, padding="same"), nn.ReLU())),
            nn.Conv2d(12, 16, (3, 5), stride=2, padding=(1, 2), groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            Twice(nn.Sequential(nn.Linear(16, 16), nn.Tanh())),
            nn.Linear(16, 10),
        )
    return network.to(device).eval(), normal(12, 3, 10, 9, seed=12, device=device).float()


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network whose kind, depth, widths and geometry are drawn from a seed, and 8 inputs for it.

    Returns:
        A convolutional network or a perceptron in eval mode, with random weights, and its inputs in float32.
    """
    draw = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, size = _convolutional(draw) if draw.random() < 0.6 else _perceptron(draw)
    return network.eval(), normal(8, *size, seed=seed).float()


def _perceptron(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width = first = draw.randint(8, 128)
    parts: list[nn.Module] = []
    for _ in range(draw.randint(1, 4)):
        after = draw.randint(4, 160)
        parts += [nn.Linear(width, after, bias=draw.random() < 0.7), nn.ReLU()]
        width = after
        if draw.random() < 0.3:
            parts.append(Twice(nn.Linear(width, width)))
        if draw.random() < 0.3:
            parts.append(nn.LayerNorm(width))
    parts.append(nn.Linear(width, draw.randint(2, 20)))
    return nn.Sequential(*parts), ((first,) if draw.random() < 0.7 else (draw.randint(2, 6), first))


def _convolutional(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width = first = draw.randint(1, 4)
    parts: list[nn.Module] = []
    halvings = 2
    for _ in range(draw.randint(2, 5)):
        groups = 2 if width % 2 == 0 and draw.random() < 0.3 else 1
        after = 2 * draw.randint(3, 32)
        kernel = draw.choice([(1, 1), (3, 3), (3, 3), (5, 5), (3, 1), (3, 5)])
        stride = draw.choice([1, 2]) if halvings else 1
        halvings -= stride - 1
        options = {
            "stride": stride,
            "padding": tuple(size // 2 for size in kernel),
            "groups": groups,
            "bias": draw.random() < 0.5,
            "padding_mode": draw.choice(["zeros", "zeros", "reflect", "circular"]),
        }
        parts.append(nn.Conv2d(width, after, kernel, **options))  # type: ignore[arg-type]
        width = after
        if draw.random() < 0.5:
            parts.append(nn.BatchNorm2d(width))
        parts.append(nn.ReLU())
        if draw.random() < 0.4:
            parts.append(Residual(nn.Conv2d(width, width, 3, padding="same", bias=draw.random() < 0.5)))
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, draw.randint(2, 20))]
    return nn.Sequential(*parts), (first, draw.randint(9, 14), draw.randint(9, 14))

"""Small networks with residual branches of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 12


class ConvBlock(nn.Module):
    """Two convolutions; adds, and adds in place where asked; a projection in the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, *, in_place: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.project = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            y += self.project(x)
            return F.relu(y)
        return F.relu(self.project(x) + y)


class ConvNet(nn.Module):
    """A stem, three blocks, a head."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(
            ConvBlock(WIDTH, WIDTH, in_place=in_place),
            ConvBlock(WIDTH, 16, in_place=in_place),
            ConvBlock(16, 16, in_place=in_place),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return result


class Attention(nn.Module):
    """Two heads; returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    """A transformer layer with norms before its branches, or behind the sums."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.before = before
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x))[0]
            return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
        x = self.norm1(x + self.attention(x)[0])
        return self.norm2(x + self.mlp(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Two transformer layers and a head."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(before=before), Layer(before=before)])
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": ConvNet,
    "in place": lambda: ConvNet(in_place=True),
    "norms before": lambda: Encoder(before=True),
    "norms behind": lambda: Encoder(before=False),
}
LAST = {  # last layer of every branch
    "convolutions": [f"blocks.{i}.conv2" for i in range(3)],
    "in place": [f"blocks.{i}.conv2" for i in range(3)],
    "norms before": [f"layers.{i}.{last}" for i in range(2) for last in ("attention.out", "mlp.2")],
    "norms behind": [f"layers.{i}.{last}" for i in range(2) for last in ("attention.out", "mlp.2")],
}


def made(name: str, seed: int = 3) -> nn.Module:
    """A network in eval mode, with norms that are no identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.normal_(tensor, 0, 0.3)
    return model.eval()


def inputs(name: str, samples: int = 256, seed: int = 5) -> list[Tensor]:
    """Batches of inputs."""
    generator = torch.Generator().manual_seed(seed)
    size = (3, 8, 8) if name in ("convolutions", "in place") else (7, WIDTH)
    return list(torch.randn(samples, *size, generator=generator).split(64))

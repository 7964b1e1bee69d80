"""The demo's network: a residual CNN for 8×8 scans, small enough to ship its trained weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights.safetensors"
CARD = FOLDER / "weights.json"
WIDTHS = (24, 40, 72)  # channels of the three stages, at 8×8, 4×4 and 2×2 pixels
CLASSES = 10


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, added to a shortcut (1×1 where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H/stride, W/stride)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class DigitNet(nn.Module):
    """Stem, three residual stages, mean over pixels, linear classifier.

    Args:
        widths: Channels of each stage; every stage after the first halves the resolution.
        blocks: Residual blocks a stage.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(inputs, width, 2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of scans.

        Args:
            images: Scans, shape (N, 1, 8, 8), grey values in [0, 1].

        Returns:
            Logits, shape (N, 10).
        """
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


def make_model(*, seed: int = 0) -> DigitNet:
    """The untrained network; this function is the `factory` that `rankfold.load` needs.

    Args:
        seed: Seed of the initial weights; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()


def trained() -> DigitNet:
    """The network with the weights that ship with the package, in eval mode."""
    model = make_model()
    load_model(model, str(WEIGHTS), strict=True)
    return model.eval()


def card() -> dict[str, Any]:
    """Record of how the shipped weights were trained, and of their accuracy on the held-out scans."""
    value: dict[str, Any] = json.loads(CARD.read_text(encoding="utf-8"))
    return value

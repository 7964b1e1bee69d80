"""Residual networks for small images, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: a 1×1 convolution where shapes change, or zeros for new channels.

    Args:
        inputs: Channels that come.
        outputs: Channels that go.
        stride: Of the first convolution.
        padded: Whether new channels of the shortcut are zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2 if padded else 0
        changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module = nn.Identity()
        if changes and not padded:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of blocks of which each but the first halves the image, and a classifier.

    Args:
        widths: Channels of each stage.
        blocks: Blocks of each stage.
        channels: Of the images.
        padded: See `Block`.
        classes: Number of classes.
    """

    def __init__(self, widths: list[int], blocks: int, channels: int, padded: bool, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for index, width in enumerate(widths):
            stage = []
            for place in range(blocks):
                stage.append(Block(inputs, width, 2 if index and not place else 1, padded))
                inputs = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def network(name: str, width: float = 1.0, channels: int = 3) -> ResNet:
    """A network with random weights: "resnet18" of 64 to 512 channels, "resnet20" of 16 to 64, times a width."""
    if not 0.1 <= width <= 16:
        raise ValueError(f"width {width}: from 0.1 to 16")
    if name == "resnet18":
        return ResNet([round(each * width) for each in (64, 128, 256, 512)], 2, channels, padded=False)
    if name == "resnet20":
        return ResNet([round(each * width) for each in (16, 32, 64)], 3, channels, padded=True)
    raise ValueError(f"no network {name!r}: resnet18 or resnet20")

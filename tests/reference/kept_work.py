"""What tests of kept work share: a small network, the bits of a result, and the files of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Three layers with a batch norm that takes up a bias, so that every kind of change is kept."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def bits(out: Any) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in out.model.state_dict().items()}


def files(folder: Path) -> dict[str, float]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}

"""A network and its compression, for the tests of checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.comparison.compare import Comparison
from rankfold.cost.resources import Cost


class Network(nn.Module):
    """A shared layer, a batch norm, a buffer that is not persistent, and tied weights."""

    scale: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.head, self.tied = nn.Linear(width, width), nn.Linear(width, width)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        result: Tensor = self.tied(self.head(self.again(self.first(x).tanh()) * self.scale))
        return result


def make_network() -> nn.Module:
    return Network()


def make_out() -> rf.Compressed:
    """A network by a plan without data, with a report of it."""
    from rankfold.report.data import Report
    from rankfold.sites.finding import fingerprint

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make_network()
        model(torch.randn(16, 3, 6, 6))  # the batch norm's statistics
    model.eval()
    plan = rf.Plan(
        (rf.Decision("conv", rf.SVD(), 3), rf.Decision("first", rf.SVD(), 2)), (), fingerprint(model), "Network"
    )
    alike = Comparison(1, 1, 1.0, 0.0, 0.0, 0.0, None, None, None, (), True)
    return rf.Compressed(rf.apply(model, plan), plan, Report("Network", (), Cost(), Cost(), {}, None, alike))


OUT = make_out()
INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(6))

"""One of several processes that train together; started by test_ddp.py as `ddp_worker.py FOLDER RANK SIZE`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf

STEPS, MICRO = 3, 2  # steps of the optimizer, batches that each of them accumulates
WAYS = ("sum", "gradients", "accumulated sum", "accumulated gradients")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    count = STEPS * MICRO
    return [
        (torch.randn(8, 3, 6, 6, generator=draws, dtype=torch.float64), torch.randint(5, (8,), generator=draws))
        for _ in range(count)
    ]


def train(
    way: str, rank: int, size: int, penalty: rf.training.Regularizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Some steps on the part of every batch that is this process's; with a share of the loss unless said."""
    model = network()
    penalty = penalty or rf.training.NuclearNorm(share=0.3)
    wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    micro = MICRO if way.startswith("accumulated") else 1
    told: list[Tensor] = []
    for index, (x, y) in enumerate(batches()):
        loss = F.cross_entropy(wrapped(x[rank::size]), y[rank::size]) / micro
        told.append(loss.detach())
        if way.endswith("sum"):
            loss = loss + penalty(wrapped, loss * micro) / micro
        loss.backward()
        if (index + 1) % micro == 0:
            if way.endswith("gradients"):
                penalty.add_gradients(wrapped, torch.stack(told).sum(), optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
            told.clear()
    return model.state_dict(), penalty.state_dict()


def main(folder: Path, rank: int, size: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=size, rank=rank, timeout=timedelta(seconds=60))
    torch.save({way: train(way, rank, size) for way in WAYS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

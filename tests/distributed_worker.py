"""One of several processes; started by test_distributed.py as `distributed_worker.py FOLDER RANK SIZE`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.latency import latency_ratio
from rankfold.progress import Progress, silent
from rankfold.trials import attempts

BUDGET = rf.Budget(params=0.7)
ROADS: dict[str, dict[str, Any]] = {
    "default": {},
    "no repair": {"repair": None, "selector": rf.Lagrangian()},
    "one tensor": {"selector": rf.Uniform(), "positions": 8, "repair": rf.Lockstep(batch=32, anchor=0.5)},
    "one tensor, candidates": {"repair": rf.Lockstep(batch=64)},
}


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(road: str) -> Any:
    """Uneven batches: the last micro-batch of one process is smaller, and samples do not divide evenly."""
    whole = torch.randn(190, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return whole if road.startswith("one tensor") else list(whole.split(40))


def at(stage: str, strike: Callable[[], None]) -> Progress:
    """A progress that does something when a stage begins."""

    def progress(name: str, steps: int | None) -> AbstractContextManager[Callable[[], None]]:
        if name == stage:
            strike()
        return nullcontext(lambda: None)

    return progress


def fail() -> None:
    raise ValueError("struck")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(data: Any, progress: Progress) -> tuple[str, str, float]:
    """Class, text and seconds of the error that a compression ends with."""
    start = time.perf_counter()
    try:
        rf.compress(network(), data, budget=BUDGET, selector=rf.Uniform(), progress=progress)
    except Exception as cause:  # noqa: BLE001
        return type(cause).__name__, str(cause), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def main(folder: Path, rank: int, size: int) -> None:
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=size, rank=rank, timeout=patience)
    attempts.latency_ratio = partial(latency_ratio, seconds=0.0)
    result: dict[str, Any] = {}
    for road, options in ROADS.items():
        out = rf.compress(network(), images(road), budget=BUDGET, **options)
        result[road] = out.model.state_dict(), out.plan.to_json(), out.report.comparison.to_json(), out.report.latency
    result["raised"] = ended(images(""), at("curves", fail) if rank == 1 else silent)
    result["other data"] = ended(images("")[rank:], silent)
    result["few"] = ended(images("")[0], silent)
    torch.save(result, folder / f"{rank}.pt")
    result["died"] = ended(images(""), at("lockstep", die) if rank == 1 else silent)
    torch.save(result, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

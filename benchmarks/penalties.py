"""What a step of training costs with each penalty, as a ratio to the plain step in the same run.

    python -m benchmarks.penalties [--seconds 20] [--threads 1] [--json FILE]

ResNet-18 on 32 images of 32 × 32, and a transformer of six layers, 384 wide, on 8 texts of 64 tokens. Steps are
taken in turns: one plain, one of each penalty, and so on; the median of the ratios and its quartiles, of what is done
every ten steps the mean over whole tens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from examples.training.networks import network
from torch import Tensor, nn

import rankfold as rf

Step = Callable[[], None]


class Every:
    """The proximal step of the nuclear norm, every so many steps."""

    def __init__(self, every: int) -> None:
        self.penalty, self.every, self.done = rf.training.NuclearNorm(1e-4), every, 0

    def __call__(self, model: nn.Module) -> None:
        self.done += 1
        if self.done % self.every == 0:
            self.penalty.proximal_(model, 0.1 * self.every)


def transformer() -> nn.Module:
    """Six layers of a width of 384, and a classifier of all positions."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64 * 384, 10)
    )


def steps(make: Callable[[], nn.Module], x: Tensor) -> dict[str, Step]:
    """A step of each penalty, each with a model of its own."""
    y = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))

    def step_of(penalty: rf.training.Regularizer | Every | None, model: nn.Module) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

        def step() -> None:
            loss = F.cross_entropy(model(x), y)
            if isinstance(penalty, rf.training.Regularizer):
                loss = loss + penalty(model, loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(penalty, Every):
                penalty(model)

        return step

    training = rf.training
    penalties: dict[str, tuple[rf.training.Regularizer | Every | None, nn.Module]] = {
        "plain": (None, make()),
        "NuclearNorm": (training.NuclearNorm(1e-4), make()),
        "NuclearNorm, proximal every 10": (Every(10), make()),
        "FirstDerivative": (training.FirstDerivative(1e-2), make()),
        "SecondDerivative": (training.SecondDerivative(1e-2), make()),
        "Orthogonality(of='all')": (training.Orthogonality(1e-4, of="all"), make()),
        "Orthogonality(of='all', kind='double')": (training.Orthogonality(1e-4, of="all", kind="double"), make()),
        "Orthogonality(of='all', kind='spectral')": (training.Orthogonality(1e-4, of="all", kind="spectral"), make()),
        "overparameterized": (None, training.overparameterize(make())),
        "overparameterized, Orthogonality": (training.Orthogonality(1e-4), training.overparameterize(make())),
    }
    ordered = training.to_ordered(make())
    penalties["ordered, HierarchicalLasso"] = (training.HierarchicalLasso(1e-5), ordered)
    return {name: step_of(penalty, model.train()) for name, (penalty, model) in penalties.items()}


def ratios(taken: dict[str, Step], seconds: float) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of each step's time over that of the plain one of the same turn."""
    for step in taken.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in taken}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["plain"]) % 10 or not found["plain"]:  # whole tens
        times = {}
        for name, step in taken.items():
            start = time.perf_counter()
            step()
            times[name] = time.perf_counter() - start
        for name, value in times.items():
            found[name].append(value / times["plain"])
    result = {}
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = (statistics.fmean(values) if "every" in name else middle, low, high)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    draws = torch.Generator().manual_seed(0)
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "ResNet-18": (lambda: network("resnet18"), torch.randn(32, 3, 32, 32, generator=draws)),
        "transformer": (transformer, torch.randn(8, 64, 384, generator=draws)),
    }
    rows = {}
    for name, (make, x) in cases.items():
        torch.manual_seed(0)
        rows[name] = ratios(steps(make, x), told.seconds)
        for penalty, (middle, low, high) in rows[name].items():
            print(f"{name}  {penalty}  {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    if told.json is not None:
        told.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

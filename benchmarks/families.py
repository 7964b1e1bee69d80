"""Every family that makes one layer smaller, on trained networks: alone, uniform and global, with repair and without.

    python -m benchmarks.families [--network resnet56 minilm] [--only CP Tucker …] [--latency] [--json FILE]
    python -m benchmarks.families --vbmf [--network resnet20 resnet56]
    python -m benchmarks.families --wide

ResNets keep half of their parameters and are judged on all test images (top-1, agreement), MiniLM-L6 keeps 0.7 of its
encoder's and is judged by the mean cosine of 500 sentence embeddings. `--vbmf` is the third seed's pipeline without its
training: variational Bayes ranks, weakened, Tucker-2; plain, with batch norms estimated again, and repaired. `--wide`
plants a low multilinear rank in wide layers, where tensors pay.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks import encoder
from benchmarks.networks import cifar
from rankfold.cost.latency import latency_ratio
from rankfold.data.batches import Batch

FAMILIES: dict[str, list[rf.Family]] = {
    "SVD": [rf.SVD()],
    "WhitenedSVD": [rf.WhitenedSVD()],
    "WhitenedSVD, mirrored": [rf.WhitenedSVD(mirrored=True)],
    "Pivoted": [rf.Pivoted()],
    "SpatialSVD": [rf.SpatialSVD()],
    "Tucker2": [rf.Tucker2()],
    "Tucker2, plain": [rf.Tucker2(whitened=False)],
    "Tucker": [rf.Tucker()],
    "CP": [rf.CP()],
    "TensorTrain": [rf.TensorTrain()],
    "TensorTrain, tied": [rf.TensorTrain(separable=False, tied=True)],
    "LinearTrain": [rf.LinearTrain()],
    "ASVD": [rf.ASVD()],
    "FisherSVD": [rf.FisherSVD()],
    "KroneckerSVD": [rf.KroneckerSVD()],
    "FeaturePCA": [rf.FeaturePCA(multiple_of=1)],
}
LINEAR = ("SVD", "WhitenedSVD", "Pivoted", "LinearTrain", "ASVD", "FisherSVD", "KroneckerSVD", "FeaturePCA")


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        model: The network.
        data: Calibration batches.
        judge: Compressed model to its figures.
        budget: What is asked for.
        timed: Batches of 1 and 64 samples.
        spared: Layers that stay as they are.
        families: Names of the families that have a case there.
    """

    model: nn.Module
    data: list[Batch]
    judge: Callable[[nn.Module], dict[str, float]]
    budget: rf.Budget
    timed: list[Batch]
    spared: tuple[str, ...]
    families: tuple[str, ...]


def images(name: str) -> Task:
    """A ResNet for CIFAR-10."""
    network = cifar(name)

    def judge(small: nn.Module) -> dict[str, float]:
        seen = rf.compare(network.original, small, network.test)
        return {"top-1": 100 * (seen.top1 or (0.0, 0.0))[1], "agreement": 100 * (seen.agreement or 0.0)}

    timed = [network.test[0][0][:size] for size in (1, 64)]
    data = list(network.calibration(1024, 0))
    return Task(network.model, data, judge, rf.Budget(params=0.5), timed, (), tuple(FAMILIES))


def sentences() -> Task:
    """MiniLM-L6."""
    tokenizer, model = encoder.encoder()
    test = encoder.batches(tokenizer, encoder.sentences("test", 500))
    expected = encoder.embeddings(model, test)
    whole, inner = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))

    def judge(small: nn.Module) -> dict[str, float]:
        return {"cosine": float((encoder.embeddings(small, test) * expected).sum(-1).mean())}

    timed: list[Batch] = [{name: value[:size] for name, value in test[0].items()} for size in (1, 64)]
    data: list[Batch] = list(encoder.batches(tokenizer, encoder.sentences("valid", 1024)))
    budget = rf.Budget(params=int(whole - inner * 0.3))
    return Task(model, data, judge, budget, timed, ("embeddings.*",), LINEAR)


def run(task: Task, name: str, *, latency: bool) -> Iterator[dict[str, Any]]:
    """The rows of one family."""
    families = FAMILIES[name]
    for repair in (None, rf.Lockstep()):
        for selector in (rf.Uniform(), rf.Lagrangian()):
            start = time.process_time()
            row: dict[str, Any] = {"family": name, "selector": str(selector)[:10], "repair": repair is not None}
            try:
                out = rf.compress(
                    task.model,
                    task.data,
                    families=families,
                    budget=task.budget,
                    selector=selector,
                    repair=repair,
                    exclude=task.spared,
                )
            except rf.RankfoldError as cause:
                yield row | {"refused": str(cause)[:160]}
                continue
            row |= task.judge(out.model) | {"macs": out.report.after.macs / out.report.before.macs}
            row["seconds"] = time.process_time() - start
            if latency:
                for size, batch in zip((1, 64), task.timed, strict=True):
                    row[f"latency {size}"] = latency_ratio(task.model, out.model, batch).ratio
            yield row


def variational(name: str) -> Iterator[dict[str, Any]]:
    """Variational Bayes ranks for Tucker-2, weakened; plain, batch norms estimated again, repaired."""
    task = images(name)
    for weaken in (0.5, 0.6, 0.7, 0.8, 0.9):
        options: dict[str, Any] = {
            "families": [rf.Tucker2(whitened=False)],
            "selector": rf.EVBMF(weaken=weaken, noise="clamp"),
        }
        plain = rf.compress(task.model, task.data, **options, repair=None)
        row: dict[str, Any] = {"network": name, "weaken": weaken}
        row["params"] = plain.report.after.params / plain.report.before.params
        row |= {f"plain {k}": v for k, v in task.judge(plain.model).items()}
        rf.reestimate_batch_norms(plain.model, task.data)
        row |= {f"norms {k}": v for k, v in task.judge(plain.model).items()}
        repaired = rf.compress(task.model, task.data, **options)
        yield row | {f"repaired {k}": v for k, v in task.judge(repaired.model).items()}


def planted(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Wide layers of random weights with a planted multilinear rank: what is found at the budget that it needs."""
    cases: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]] = [
        ("7×7, 128 → 128", nn.Conv2d(128, 128, 7, padding=3), (2, 128, 14, 14), (16, 20, 3, 3)),
        ("5×5×5, 48 → 48", nn.Conv3d(48, 48, 5, padding=2), (2, 48, 6, 6, 6), (10, 12, 2, 2, 2)),
        ("3×3, 512 → 512", nn.Conv2d(512, 512, 3, padding=1), (2, 512, 7, 7), (40, 48, 3, 3)),
    ]
    methods: dict[str, rf.Decomposition] = {
        "Tucker": rf.Tucker(whitened=False),
        "Tucker2": rf.Tucker2(whitened=False),
        "TensorTrain": rf.TensorTrain(whitened=False),
        "SVD": rf.SVD(),
    }
    for title, layer, size, rank in cases:
        torch.manual_seed(seed)
        weight = layer.weight.detach()  # type: ignore[union-attr, operator]
        ranks = (rank[1], rank[0], *rank[2:])
        parts = [torch.linalg.qr(torch.randn(n, r))[0] for n, r in zip(weight.shape, ranks, strict=True)]
        core = torch.randn(rank[1], rank[0], *rank[2:])
        for mode, part in enumerate(parts):
            core = torch.movedim(torch.tensordot(part, core, ([1], [mode])), 0, mode)
        noise = torch.randn(weight.shape) * core.norm() / weight.numel() ** 0.5 * 0.01
        layer.weight = nn.Parameter(core + noise)
        model = nn.Sequential(layer).eval()
        data = [torch.randn(size)]
        for name, method in methods.items():
            start = time.process_time()
            out = rf.compress(
                model,
                data,
                families=[method],
                selector=rf.EVBMF(weaken=1.0, noise="clamp"),
                weighting=False,
                repair=None,
            )
            decision = out.plan.decisions[0]
            yield {
                "layer": title,
                "planted": rank,
                "family": name,
                "rank": decision.rank,
                "params": out.report.after.params / out.report.before.params,
                "macs": out.report.after.macs / out.report.before.macs,
                "error": rf.compare(model, out.model, data).relative_error,
                "latency": latency_ratio(model, out.model, data[0]).ratio,
                "seconds": time.process_time() - start,
            }


def shown(row: dict[str, Any]) -> str:
    """One line."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet56", "minilm"])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--latency", action="store_true", help="time the models too, on a quiet machine")
    parser.add_argument("--vbmf", action="store_true")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(shown(row), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1, default=str) + "\n", encoding="utf-8")

    if options.wide:
        for row in planted():
            add(row)
        return
    for name in options.network:
        if options.vbmf:
            for row in variational(name):
                add(row)
            continue
        task = sentences() if name == "minilm" else images(name)
        for family in options.only or task.families:
            if family in task.families:
                for row in run(task, family, latency=options.latency):
                    add({"network": name, **row})


if __name__ == "__main__":
    main()

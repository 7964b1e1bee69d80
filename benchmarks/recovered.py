"""What a little training without labels brings back after a deep cut: `rankfold.training.recover`.

    python -m benchmarks.recovered [resnet56 minilm] [--kept 0.3 0.2 0.1] [--parts all norms blocks] [--steps 500]
        [--folder recovered] [--json FILE]

1,024 unlabelled inputs, the same for compression and recovery. ResNets: top-1 and agreement on all test images;
MiniLM-L6: mean cosine of 500 sentence embeddings at shares of the encoder. Forwards are passes of the compressed
network over the 1,024 inputs. The folder keeps compressed networks, so that other settings need no second compression.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks import encoder
from benchmarks.networks import cifar
from rankfold.data.batches import Batch

SAMPLES = 1024


@dataclass(frozen=True)
class Task:
    """A network, its unlabelled inputs, and how a smaller one is judged.

    Attributes:
        model: The original.
        data: Unlabelled batches.
        judge: Smaller model to its figures.
        budget: Share kept to the budget.
        loss: Of `recover`.
    """

    model: nn.Module
    data: list[Batch]
    judge: Callable[[nn.Module], dict[str, float]]
    budget: Callable[[float], rf.Budget]
    loss: str


def images(name: str) -> Task:
    """A ResNet for CIFAR-10."""
    network = cifar(name)

    def judge(small: nn.Module) -> dict[str, float]:
        seen = rf.compare(network.original, small, network.test)
        return {"top-1": 100 * (seen.top1 or (0.0, 0.0))[1], "agreement": 100 * (seen.agreement or 0.0)}

    return Task(network.model, list(network.calibration(SAMPLES, 0)), judge, lambda kept: rf.Budget(params=kept), "kl")


def sentences() -> Task:
    """MiniLM-L6."""
    tokenizer, model = encoder.encoder()
    test = encoder.batches(tokenizer, encoder.sentences("test", 500))
    expected = encoder.embeddings(model, test)
    whole, inner = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))

    def judge(small: nn.Module) -> dict[str, float]:
        return {"cosine": float((encoder.embeddings(small, test) * expected).sum(-1).mean())}

    data: list[Batch] = list(encoder.batches(tokenizer, encoder.sentences("valid", SAMPLES)))
    return Task(model, data, judge, lambda kept: rf.Budget(params=int(whole - inner * (1 - kept))), "error")


def smaller(task: Task, folder: Path, kept: float, spared: tuple[str, ...]) -> nn.Module:
    """The compressed network, from the folder if it is there."""
    if not folder.is_dir():
        rf.save(rf.compress(task.model, task.data, budget=task.budget(kept), exclude=spared), folder)
    return rf.load(folder, factory=lambda: copy.deepcopy(task.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet56"], help="of resnet20, resnet56, minilm")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.3, 0.2, 0.1])
    parser.add_argument("--parts", nargs="+", default=["all", "norms", "blocks"])
    parser.add_argument("--loss", choices=("kl", "error"))
    parser.add_argument("--steps", type=int, nargs="+", default=[500])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("recovered"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    rows: list[dict[str, Any]] = []
    for name in told.networks:
        task = sentences() if name == "minilm" else images(name)
        spared = ("embeddings.*",) if name == "minilm" else ()
        for kept in told.kept:
            small = smaller(task, told.folder / f"{name}-{kept}", kept, spared)
            before = task.judge(small)
            print(f"{name}  kept {kept}  before  {said(before)}", flush=True)
            for parts in told.parts:
                for steps in told.steps:
                    start = time.process_time()
                    loss = told.loss or task.loss
                    back = rf.training.recover(
                        task.model, small, task.data, steps=steps, parts=parts, loss=loss, rate=told.rate
                    )
                    seconds = time.process_time() - start
                    row: dict[str, Any] = {"network": name, "kept": kept, "parts": parts, "loss": loss, "steps": steps}
                    row |= {f"{key} before": value for key, value in before.items()} | task.judge(back.model)
                    row |= {"best": back.best, "taken": back.steps, "forwards": back.forwards}
                    row |= {"held-out before": back.before, "held-out": back.after}
                    row["seconds"] = seconds
                    rows.append(row)
                    print(said(row), flush=True)
                    if told.json is not None:
                        told.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def said(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


if __name__ == "__main__":
    main()

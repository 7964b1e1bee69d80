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
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks.families import Task, images, sentences, shown


def budget(task: Task, kept: float) -> rf.Budget:
    """A share of a ResNet's parameters, of MiniLM of its encoder's."""
    cut = task.model.get_submodule("encoder") if task.spared else task.model
    whole, inner = (sum(each.numel() for each in part.parameters()) for part in (task.model, cut))
    return rf.Budget(params=int(whole - inner * (1 - kept)))


def smaller(task: Task, folder: Path, kept: float) -> nn.Module:
    """The compressed network, from the folder if it is there."""
    if not folder.is_dir():
        rf.save(rf.compress(task.model, task.data, budget=budget(task, kept), exclude=task.spared), folder)
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
        for kept in told.kept:
            small = smaller(task, told.folder / f"{name}-{kept}", kept)
            before = task.judge(small)
            print(f"{name}  kept {kept}  before  {shown(before)}", flush=True)
            for parts in told.parts:
                for steps in told.steps:
                    start = time.process_time()
                    loss = told.loss or ("error" if name == "minilm" else "kl")
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
                    print(shown(row), flush=True)
                    if told.json is not None:
                        told.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

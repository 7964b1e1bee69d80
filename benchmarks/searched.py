"""Ranks by gradient descent on a mixture (`rankfold.training.search`) beside ours at the size it comes to.

    python -m benchmarks.searched [--network resnet20] [--methods TensorTrain CP] [--gamma 0.4] [--epochs 3]
        [--steps 500] [--json FILE]

`search` reads labelled images (a part of the training images), then its plan is carried out: as it is; after
fine-tuning with the loss of its authors but for the distance of weights (cross-entropy and half the distance of the
layers' outputs from the original's; here by AdamW at 1e-3, there at 1e-5) on all training images; and with our repair.
Ours: the same family under `Lagrangian` with lockstep repair, and the default, at the same number of parameters,
without and with `recover` (no labels). Top-1 on all test images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from benchmarks.networks import Network, cifar

METHODS: dict[str, rf.Decomposition] = {
    "TensorTrain": rf.TensorTrain(separable=False, tied=True, whitened=False),
    "CP": rf.CP(whitened=False),
}
WHITENED: dict[str, rf.Decomposition] = {
    "TensorTrain": rf.TensorTrain(separable=False, tied=True),
    "CP": rf.CP(),
}


def fine_tuned(original: nn.Module, small: nn.Module, paths: list[str], network: Network, epochs: int) -> nn.Module:
    """Train with labels: cross-entropy and half the mean relative distance of the layers' outputs."""
    images, labels = network.train
    kept: dict[tuple[str, str], Tensor] = {}

    def keep(whose: str, path: str) -> Any:
        return lambda module, args, out: kept.__setitem__((whose, path), out)

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(whose, path))
        for whose, model in (("original", original), ("small", small))
        for path in paths
    ]
    optimizer = torch.optim.AdamW(small.parameters(), 1e-3)
    batch, draws = 128, torch.Generator().manual_seed(0)
    total = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))
    small.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draws).split(batch)[: len(images) // batch]:
            x, y = images[chosen], labels[chosen]
            with torch.no_grad():
                original(x)
            loss = F.cross_entropy(small(x), y)
            distances = [
                (kept["small", path] - kept["original", path]).square().sum() / kept["original", path].square().sum()
                for path in paths
            ]
            (loss + 0.5 * torch.stack(distances).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for hook in hooks:
        hook.remove()
    return small.eval()


def rows_of(network: Network, name: str, told: argparse.Namespace) -> Any:
    """The figures of one family, one after the other."""
    model, data = network.model, list(network.calibration(1024, 0))

    def top1(small: nn.Module) -> dict[str, float]:
        seen = rf.compare(network.original, small, network.test)
        return {"top-1": 100 * (seen.top1 or (0.0, 0.0))[1], "agreement": 100 * (seen.agreement or 0.0)}

    images, labels = network.train
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[: told.labelled]
    labelled = list(zip(images[chosen].split(128), labels[chosen].split(128), strict=True))
    start = time.process_time()
    found = rf.training.search(model, labelled, method=METHODS[name], gamma=told.gamma, price=told.price)
    searching = time.process_time() - start
    small = rf.apply(model, found.plan)
    params, whole = (sum(p.numel() for p in each.parameters()) for each in (small, model))
    head = {"family": name, "params": params / whole}
    yield {**head, "way": "search", **top1(small), "seconds": searching, "ranks": dict(found.ranks)}
    paths = [decision.site for decision in found.plan.changes]
    yield {**head, "way": "search, fine-tuned", **top1(fine_tuned(model, small, paths, network, told.epochs))}
    fixed = rf.Fixed({path: found.ranks[path] for path in paths})
    out = rf.compress(model, data, families=[WHITENED[name]], selector=fixed, budget=rf.Budget(params=1.0))
    yield {**head, "way": "ranks of the search, repaired", **top1(out.model)}
    budget = rf.Budget(params=params)
    for way, options in (
        ("Lagrangian, repaired", {"families": [WHITENED[name]], "selector": rf.Lagrangian()}),
        ("default", {}),
    ):
        start = time.process_time()
        out = rf.compress(model, data, budget=budget, **options)
        yield {**head, "way": way, **top1(out.model), "seconds": time.process_time() - start}
        back = rf.training.recover(model, out.model, data, steps=told.steps, loss="kl")
        yield {**head, "way": f"{way}, recover", **top1(back.model), "forwards": back.forwards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--gamma", type=float, default=0.4)
    parser.add_argument("--price", default="rank")
    parser.add_argument("--labelled", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    network, rows = cifar(told.network), []
    for name in told.methods:
        for row in rows_of(network, name, told):
            rows.append(row)
            shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True
            )
            if told.json is not None:
                told.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What training for compressibility is worth: networks that examples/training trained, made smaller without training.

    python -m examples.training.train --data $RANKFOLD_DATA/cifar10 --network resnet18 --width 0.25 --bf16 --out plain
    python -m examples.training.train … --penalty nuclear --share 0.05 --out nuclear
    python -m benchmarks.trained plain nuclear … [--kept 0.5 0.3 0.2] [--ways …] [--json FILE]

A row is a network, a size and a way to get there: the smallest weights of all set to nothing (L1 unstructured), the
smallest output channels of each layer set to nothing (L1 structured; a share √kept of them stays, since what reads them
shrinks too), plain SVD under one budget (what the method of smooth training does), the whitened SVD with lockstep
repair, ours by default. Where `--ways` names them, variational Bayes ranks for Tucker-2, weakened to the size: plain
("bayes"), with batch norms estimated anew ("bayes, norms"), repaired ("bayes, repaired"). 1,024 unlabelled training
images; top-1 on all test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from examples.training.data import Images, load
from examples.training.loop import top1
from examples.training.train import trained
from torch import nn
from torch.nn.utils import prune

import rankfold as rf

Way = Callable[[nn.Module, Images, float], nn.Module]
PLAIN: dict[str, Any] = {"repair": None, "weighting": False}


def layers(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]


def unstructured(model: nn.Module, images: Images, kept: float) -> nn.Module:
    """The smallest weights of all layers are nothing."""
    small = copy.deepcopy(model)
    weights = [(each, "weight") for each in layers(small)]
    whole = sum(each.numel() for each in small.parameters())
    sizes: list[int] = [layer.weight.numel() for layer in layers(small)]
    gone = round((1 - kept) * whole)
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=min(gone, sum(sizes)))
    return small


def structured(model: nn.Module, images: Images, kept: float) -> nn.Module:
    """The output channels of the smallest L1 norms are nothing, behind their norms too; the classifier has them all."""
    small = copy.deepcopy(model)
    last: nn.Conv2d | None = None
    for each in small.modules():
        if isinstance(each, nn.Conv2d):
            prune.ln_structured(each, "weight", amount=1 - math.sqrt(kept), n=1, dim=0)
            last = each
        elif isinstance(each, nn.BatchNorm2d) and last is not None:  # the one behind the convolution
            stays = last.weight.detach().flatten(1).abs().amax(1) > 0
            with torch.no_grad():
                each.weight.mul_(stays)
                each.bias.mul_(stays)
            last = None
    return small


def compressed(model: nn.Module, images: Images, kept: float, **options: Any) -> nn.Module:
    return rf.compress(model, images.calibration(1024), budget=rf.Budget(params=kept), **options).model


def bayes(model: nn.Module, images: Images, kept: float, **options: Any) -> nn.Module:
    """Variational Bayes ranks, weakened to the size, for Tucker-2."""
    return compressed(model, images, kept, families=[rf.Tucker2(whitened=False)], selector=rf.EVBMF(), **options)


def bayes_norms(model: nn.Module, images: Images, kept: float) -> nn.Module:
    small = bayes(model, images, kept, **PLAIN)
    rf.reestimate_batch_norms(small, images.calibration(1024))
    return small


WAYS: dict[str, Way] = {
    "L1 unstructured": unstructured,
    "L1 structured": structured,
    "SVD": lambda model, images, kept: compressed(
        model, images, kept, families=[rf.SVD()], selector=rf.Lagrangian(), **PLAIN
    ),
    "whitened, lockstep": lambda model, images, kept: compressed(
        model, images, kept, families=[rf.WhitenedSVD()], selector=rf.Lagrangian()
    ),
    "default": compressed,
    "bayes": lambda model, images, kept: bayes(model, images, kept, **PLAIN),
    "bayes, norms": bayes_norms,
    "bayes, repaired": lambda model, images, kept: bayes(model, images, kept, repair=rf.Lockstep()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:5], metavar="WAY")
    parser.add_argument("--data", help="folder of CIFAR-10; $RANKFOLD_DATA/cifar10 unless said")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    images = load(told.data or str(Path(os.environ["RANKFOLD_DATA"]) / "cifar10"))
    rows: list[dict[str, Any]] = []
    for folder in told.folders:
        model, about = trained(folder)
        print(f"{folder.name}  top-1 {100 * about['top1']:.2f}", flush=True)
        for kept in told.kept:
            for way in told.ways:
                start = time.process_time()
                row = {"network": folder.name, "dense": about["top1"], "kept": kept, "way": way}
                try:
                    small = WAYS[way](model, images, kept)
                    row["seconds"] = time.process_time() - start
                    row["top1"] = top1(small, images)
                except rf.RankfoldError as refused:
                    row["refused"] = str(refused)
                row.setdefault("seconds", time.process_time() - start)
                rows.append(row)
                said = f"{100 * row['top1']:.2f}" if "top1" in row else row["refused"]
                print(f"{folder.name}  kept {kept}  {way}  {said}  ({row['seconds']:.0f} s)", flush=True)
                if told.json is not None:
                    told.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

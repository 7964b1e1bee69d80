"""Train a network with ordered ranks once, and take networks of several sizes out of it without training.

    python -m examples.training.ordered --data FOLDER --network resnet20 --out ordered --sizes 0.7 0.5 0.3 0.2 0.1

Of the lasso's weight the method says: from large, halved until size and accuracy are as they should be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from examples.training.data import load
from examples.training.loop import check_asked, device, fit, known_of
from examples.training.networks import network
from examples.training.train import arguments, asked_of, schedule_of
from torch import nn

import rankfold as rf


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--lasso", type=float, default=1e-4, help="weight of the lasso")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2, 0.1], help="shares of params")
    told = parser.parse_args(argv)
    images = load(told.data)
    torch.manual_seed(told.seed)
    dense = network(told.network, told.width, images.channels)
    asked, ranks = asked_of(told), None
    if told.resume:
        known = known_of(told.out)
        check_asked(told.out, known, {**asked, **asdict(schedule_of(told))})
        ranks = known["log"][-1]["ranks"]
    model = rf.training.to_ordered(dense, ranks=ranks).to(device(), memory_format=torch.channels_last)
    calibration = [each.to(device()) for each in images.calibration(1024)]

    def after_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        kept = rf.training.drop_ranks(model, optimizer=optimizer)
        rf.reestimate_batch_norms(model, calibration)
        return {"ranks": kept, "kept ranks": sum(kept.values())}

    fit(
        model,
        images,
        schedule_of(told),
        told.out,
        asked=asked,
        penalties=[rf.training.HierarchicalLasso(told.lasso)],
        sampler=rf.training.OrderedSampler(model, seed=told.seed),
        after_epoch=after_epoch,
        resume=told.resume,
        until=told.until,
    )
    if told.until is not None:
        return
    whole, rows = sum(each.numel() for each in dense.parameters()), []
    for size in told.sizes:
        out = rf.training.extract(model.cpu(), images.calibration(256), rf.Budget(params=size))
        seen = rf.compare(model, out.model, images.held_out())
        kept = sum(each.numel() for each in out.model.parameters()) / whole
        rows.append({"asked": size, "kept": kept, "top1": seen.top1[1]})
        print("  ".join(f"{key} {value:.4f}" for key, value in rows[-1].items()), flush=True)
    (told.out / "sizes.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

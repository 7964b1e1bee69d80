"""Writes the checkpoint beside it. Run once for format version 1; the files it wrote must load for ever.

    python tests/checkpoints/1/write.py tests/checkpoints/1

writes `small/` (what `rankfold.save` writes), and `expected.safetensors` (inputs, and the outputs of the saved model).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import rankfold as rf


def make_model() -> nn.Module:
    """The original architecture: a layer of each kind that a checkpoint of version 1 can hold."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Unflatten(2, (3, 4)),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 6),
        nn.Linear(6, 5),
    )


def main(folder: Path) -> None:
    """Compress by a plan with every form, save, and note what the saved model computes."""
    torch.manual_seed(0)
    model, inputs = make_model().eval(), torch.randn(40, 2, 12)
    sites = rf.find_sites(model, inputs)
    chosen = {
        "0": (rf.SVD(mirrored=True), 2),
        "3": (rf.SpatialSVD(), 3),
        "6": (rf.Tucker2(), (2, 3)),
        "8": (rf.WhitenedSVD(), 3),
        "11": (rf.WhitenedSVD(), 2),
    }
    decisions = tuple(rf.Decision(site.path, *chosen.get(site.path, (None, None))) for site in sites)
    plan = rf.Plan(decisions, sites.skips, sites.fingerprint, sites.model, repair={"name": "lockstep"})
    out = rf.execute(model, inputs, plan)
    rf.save(out, folder / "small")
    with torch.no_grad():
        save_file({"inputs": inputs[:4].clone(), "outputs": out.model(inputs[:4])}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

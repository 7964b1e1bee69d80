"""Train a network so that it can be compressed without training afterwards.

    python -m examples.training.train --data FOLDER --network resnet18 --penalty nuclear --share 0.05 --out smooth
    python -m examples.training.train --data digits --network resnet20 --penalty orthogonal --weight 1e-4 --out digits

The folder holds CIFAR-10 (see `data.load`). A run that was killed goes on with `--resume`. The trained network is
`OUT/model.safetensors`, its accuracy and what was asked is in `OUT/training.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from examples.training.data import load
from examples.training.loop import Schedule, device, fit, top1
from examples.training.networks import network
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold as rf

Made = Callable[[float | None, float | None], rf.training.Regularizer]
PENALTIES: dict[str, Made] = {
    "nuclear": lambda weight, share: rf.training.NuclearNorm(weight, share=share),
    "first": lambda weight, share: rf.training.FirstDerivative(weight, share=share),
    "second": lambda weight, share: rf.training.SecondDerivative(weight, share=share),
    "orthogonal": lambda weight, share: rf.training.Orthogonality(weight, share=share),
}


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of all scripts of this folder."""
    parser.add_argument("--data", required=True, help="digits, or a folder of CIFAR-10")
    parser.add_argument("--network", choices=("resnet18", "resnet20"), default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--until", type=int, help="stop before this epoch")
    return parser


def schedule_of(told: argparse.Namespace) -> Schedule:
    return Schedule(epochs=told.epochs, batch=told.batch, rate=told.rate, bf16=told.bf16, seed=told.seed)


def trained(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A network that a script of this folder trained, and what its `training.json` says."""
    told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model = network(told["network"], told["width"], told["channels"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), told


def asked_of(told: argparse.Namespace) -> dict[str, Any]:
    """What was asked for beside the schedule and where it lies."""
    left = ("out", "resume", "until", "data", "sizes", "epochs", "batch", "rate", "bf16", "seed")
    images = "digits" if told.data == "digits" else "CIFAR-10"
    return {"images": images, **{name: value for name, value in vars(told).items() if name not in left}}


def keep(folder: Path, model: nn.Module, told: argparse.Namespace, channels: int, **more: Any) -> None:
    """Write the network and what it is."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    said = {key: value for key, value in vars(told).items() if key not in ("out", "resume", "until")}
    text = json.dumps({**said, "channels": channels, **more}, indent=1)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--penalty", choices=("none", *PENALTIES), default="none")
    parser.add_argument("--share", type=float, help="share of the loss that the penalty is held at, such as 0.05")
    parser.add_argument("--weight", type=float, help="weight of the penalty, in place of a share")
    told = parser.parse_args(argv)
    if (told.penalty == "none") != (told.share is None and told.weight is None):
        parser.error("a penalty has a --share or a --weight, and none has neither")
    penalties = [] if told.penalty == "none" else [PENALTIES[told.penalty](told.weight, told.share)]
    images = load(told.data)
    torch.manual_seed(told.seed)
    model: nn.Module = network(told.network, told.width, images.channels)
    if told.penalty == "orthogonal":
        model = rf.training.overparameterize(model)
    model = model.to(device(), memory_format=torch.channels_last)
    log = fit(
        model,
        images,
        schedule_of(told),
        told.out,
        asked=asked_of(told),
        penalties=penalties,
        resume=told.resume,
        until=told.until,
    )
    if told.until is not None:
        return
    if told.penalty == "orthogonal":
        model = rf.training.merge(model)
    keep(told.out, model.cpu(), told, images.channels, log=log, top1=top1(model.to(device()), images))


if __name__ == "__main__":
    main()

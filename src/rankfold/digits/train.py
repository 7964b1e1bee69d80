"""Train the demo's network: `python -m rankfold.digits.train [--out FOLDER]`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor

from rankfold.digits.data import held_out, training
from rankfold.digits.model import CARD, FOLDER, WEIGHTS, DigitNet, make_model
from rankfold.serialization import canonical_json

EPOCHS = 40
BATCH = 64
PEAK_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SMOOTHING = 0.05


def train(*, epochs: int = EPOCHS, seed: int = 0) -> DigitNet:
    """Train from scratch: SGD with Nesterov momentum, one warm-up and cosine cycle, scans turned, scaled and moved.

    Args:
        epochs: Passes over the training scans.
        seed: Seed of the initial weights, the order and the moves; the same seed gives the same bits on one machine.

    Returns:
        The trained network in eval mode.
    """
    images, labels = training()
    model = make_model(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_RATE, momentum=MOMENTUM, nesterov=True)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            loss = F.cross_entropy(model(moved(images[index], generator)), labels[index], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every scan turned, scaled and moved a little, on its own.

    Args:
        images: Scans, shape (N, 1, 8, 8).
        generator: Random generator of the moves.

    Returns:
        Scans of the same shape, turned by up to 10°, scaled by up to 10 %, moved by up to one pixel, bilinear, black
        outside.
    """
    number = len(images)
    draw = torch.rand(4, number, generator=generator) * 2 - 1
    angle, scale = draw[0] * (torch.pi / 18), 1 + 0.1 * draw[1]
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cosine, -sine, draw[2] / 4, sine, cosine, draw[3] / 4], 1)  # a pixel is 1/4 of the [-1, 1] axis
    grid = F.affine_grid(rows.reshape(number, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def correct(model: DigitNet) -> tuple[int, int]:
    """Number of held-out scans that the network classifies correctly, and number of all."""
    hits = [(model(images).argmax(1) == labels) for images, labels in held_out()]
    return int(torch.cat(hits).sum()), sum(len(each) for each in hits)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and write weights and card."""
    parser = argparse.ArgumentParser(prog="python -m rankfold.digits.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: the package)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    model = train(epochs=options.epochs, seed=options.seed)
    right, total = correct(model)
    card: dict[str, Any] = {
        "data": "sklearn.datasets.load_digits",
        "train": len(training()[0]),
        "test": total,
        "test_correct": right,
        "test_accuracy": round(right / total, 4),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": options.epochs,
        "batch": BATCH,
        "optimizer": f"SGD, Nesterov {MOMENTUM}, one cycle to {PEAK_RATE}, weight decay {WEIGHT_DECAY}",
        "label_smoothing": SMOOTHING,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(options.out / WEIGHTS.name))
    (options.out / WEIGHTS.name).chmod(0o644)  # safetensors leaves it readable by its owner only
    (options.out / CARD.name).write_text(canonical_json(card), encoding="utf-8")
    print(f"{right} of {total} held-out scans right, {time.perf_counter() - start:.0f} s, written to {options.out}")


if __name__ == "__main__":
    main()

"""A plain training loop with penalties, which goes on where it stopped to the same bits (on a CPU)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from examples.training.data import Images, moved
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import rankfold as rf

STATE = "state.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: Passes over the images.
        batch: Images of a step.
        rate: Highest learning rate; it climbs from nothing for three tenths of the steps and falls to nothing.
        decay: Weight decay of weights that are matrices.
        momentum: Of stochastic gradient descent, by Nesterov.
        smoothing: Of labels.
        bf16: Whether the forward pass runs in bfloat16.
        seed: Of the order of images and of their augmentation.
    """

    epochs: int = 15
    batch: int = 256
    rate: float = 0.2
    decay: float = 5e-4
    momentum: float = 0.9
    smoothing: float = 0.1
    bf16: bool = False
    seed: int = 0

    def check(self, images: int) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: A number is named with its limits.
        """
        for name, value, most in (("epochs", self.epochs, 10**6), ("batch", self.batch, images)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} {value}: from 1 to {most}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate {self.rate}: a number above 0")

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step."""
        done, top = (step + 1) / (steps + 1), 0.3
        return self.rate * (done / top if done < top else (1 - done) / (1 - top))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def optimizer_of(model: nn.Module, schedule: Schedule) -> torch.optim.SGD:
    """Decay acts on matrices and kernels, not on norms and biases."""
    heavy = [each for each in model.parameters() if each.ndim > 1]
    light = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": heavy, "weight_decay": schedule.decay}, {"params": light, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, schedule.rate, momentum=schedule.momentum, nesterov=True)


def batches(images: Images, schedule: Schedule, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in an order, and moved, as the seed and the epoch say; the incomplete last batch is left."""
    generator = torch.Generator().manual_seed(1_000_003 * schedule.seed + epoch)
    order = torch.randperm(len(images.train), generator=generator)
    for start in range(0, len(order) - schedule.batch + 1, schedule.batch):
        chosen = order[start : start + schedule.batch]
        x = images.train[chosen]
        x = moved(x, generator) if images.augmented else x
        x = images.normalised(x.to(device())).contiguous(memory_format=torch.channels_last)
        yield x, images.train_labels[chosen].to(device())


@torch.no_grad()
def top1(model: nn.Module, images: Images) -> float:
    """Share of the test images that are read rightly."""
    model.eval()
    hits = sum(int((model(x.to(device())).argmax(1).cpu() == y).sum()) for x, y in images.held_out())
    return hits / len(images.test)


def fit(
    model: nn.Module,
    images: Images,
    schedule: Schedule,
    folder: Path,
    *,
    asked: Mapping[str, Any],
    penalties: Sequence[rf.training.Regularizer] = (),
    sampler: rf.training.OrderedSampler | None = None,
    after_epoch: Callable[[nn.Module, torch.optim.Optimizer], Mapping[str, Any]] = lambda *_: {},
    resume: bool = False,
    until: int | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place, and leave in a folder what training goes on from.

    Args:
        model: On the device of `device()`.
        images: What it is trained on.
        schedule: How long and how fast.
        folder: For the state, written after each epoch.
        asked: Everything else that the result depends on, by name: a state of something else is refused.
        penalties: Added to the loss.
        sampler: Ranks of each batch.
        after_epoch: Called with model and optimizer; what it returns is in the log.
        resume: Whether to go on from the folder.
        until: Epoch to stop before.

    Returns:
        Loss, penalties, seconds and test accuracy of each epoch.

    Raises:
        ValueError: The schedule or `until` cannot be, or the folder's state is of another run.
        FileNotFoundError: There is no state to go on from.
        FileExistsError: There is one, and it was not asked to go on from it.
        FloatingPointError: The loss is NaN or infinite.
    """
    schedule.check(len(images.train))
    if until is not None and not 0 < until <= schedule.epochs:
        raise ValueError(f"until {until}: an epoch from 1 to {schedule.epochs}")
    optimizer = optimizer_of(model, schedule)
    log: list[dict[str, Any]] = []
    asked = {**asked, **asdict(schedule)}
    if resume:
        log = _restore(folder, model, optimizer, asked, penalties, sampler)
    elif (folder / STATE).exists():
        raise FileExistsError(f"{folder}: holds a run; go on with --resume, or choose another folder")
    per_epoch = len(images.train) // schedule.batch
    for epoch in range(len(log), schedule.epochs if until is None else until):
        model.train()
        start, sums = time.perf_counter(), torch.zeros(2)
        for step, (x, y) in enumerate(batches(images, schedule, epoch), start=epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step, schedule.epochs * per_epoch)
            if sampler is not None:
                sampler.step()
            with torch.autocast(device().type, torch.bfloat16, enabled=schedule.bf16):
                loss = F.cross_entropy(model(x), y, label_smoothing=schedule.smoothing)
            added = [penalty(model, loss) for penalty in penalties]
            total = torch.stack([loss.float(), *added]).sum()
            told, whole = loss.item(), total.item()
            if not math.isfinite(whole):
                raise FloatingPointError(f"{folder}: the loss of step {step} is {whole}; lower --rate")
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums += torch.tensor([told, whole - told])
        if sampler is not None:
            sampler.rest()
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": float(sums[0]) / per_epoch}
        row |= {"penalty": float(sums[1]) / per_epoch, **after_epoch(model, optimizer)}
        row |= {"top1": top1(model, images), "seconds": time.perf_counter() - start}
        log.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items() if not isinstance(value, dict)), flush=True)
        _store(folder, model, optimizer, asked, penalties, sampler, log)
    return log


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer knows of each parameter by its name."""
    return {
        name: optimizer.state[each]["momentum_buffer"]
        for name, each in model.named_parameters()
        if optimizer.state.get(each, {}).get("momentum_buffer") is not None
    }


def _store(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    asked: Mapping[str, Any],
    penalties: Sequence[rf.training.Regularizer],
    sampler: rf.training.OrderedSampler | None,
    log: list[dict[str, Any]],
) -> None:
    """Write the state to one file, which is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"momentum.{name}": value for name, value in _moments(model, optimizer).items()}
    known = {
        "asked": dict(asked),
        "penalties": [penalty.state_dict() for penalty in penalties],
        "sampler": None if sampler is None else sampler.state_dict(),
        "log": log,
    }
    new = folder / f"{STATE}.new"
    save_file({name: value.contiguous() for name, value in tensors.items()}, new, {"told": json.dumps(known)})
    os.replace(new, folder / STATE)


def known_of(folder: Path) -> dict[str, Any]:
    """What a state says beside its tensors.

    Raises:
        FileNotFoundError: There is none to go on from.
    """
    if not (folder / STATE).is_file():
        raise FileNotFoundError(f"{folder / STATE}: nothing to resume; leave --resume out")
    with safe_open(folder / STATE, "pt") as file:
        known: dict[str, Any] = json.loads(file.metadata()["told"])
        return known


def check_asked(folder: Path, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a state of another run.

    Raises:
        ValueError: Something was asked for otherwise; it is named.
    """
    there = known["asked"]
    names = sorted(there.keys() | asked.keys())
    differs = {name: (there.get(name), asked.get(name)) for name in names if there.get(name) != asked.get(name)}
    if differs:
        raise ValueError(f"{folder}: the state of another run (there, here): {differs}; choose another folder")


def _restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    asked: Mapping[str, Any],
    penalties: Sequence[rf.training.Regularizer],
    sampler: rf.training.OrderedSampler | None,
) -> list[dict[str, Any]]:
    """Take the state of a folder.

    Raises:
        ValueError: It is of another run; nothing is changed.
    """
    known = known_of(folder)
    check_asked(folder, known, asked)
    with safe_open(folder / STATE, "pt", str(device())) as file:
        model.load_state_dict({name: file.get_tensor(f"model.{name}") for name in model.state_dict()})
        for name, each in model.named_parameters():
            if f"momentum.{name}" in file.keys():  # noqa: SIM118
                optimizer.state[each]["momentum_buffer"] = file.get_tensor(f"momentum.{name}")
    for penalty, state in zip(penalties, known["penalties"], strict=True):
        penalty.load_state_dict(state)
    if sampler is not None:
        sampler.load_state_dict(known["sampler"])
    log: list[dict[str, Any]] = known["log"]
    return log

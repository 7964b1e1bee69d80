"""Distillation of a compressed network from its original, without labels: an optional step of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.checks import check_choice, check_count, check_number
from rankfold.comparison.tally import check_shapes
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.draws import check_seed
from rankfold.data.running import call, device_of
from rankfold.data.splits import Split, as_batches, held_out_of, merged
from rankfold.errors import DataError, ModelError, NumericsError, OptionError
from rankfold.outputs.taken import output_tensor
from rankfold.sites.copies import copied
from rankfold.sites.models import check_module
from rankfold.training.forms import eval_mode

PARTS = ("all", "norms", "blocks")
LOSSES = ("error", "kl")
LOOKS = 20  # times that held-out samples are looked at


@dataclass(frozen=True, eq=False)
class Recovered:
    """What `recover` gave.

    Attributes:
        model: The network of the best look: the one given, where nothing was better.
        before: Loss on held-out samples before.
        after: The same of `model`, at most `before`.
        best: Number of steps after which it was best; 0 where nothing was better.
        steps: Number of steps taken.
        forwards: What it cost in forward passes of the compressed network over all of the data: a step counts three for
            its samples (a backward pass is two), a look one for those held out, and one of the original counts as one.
        losses: Number of steps and held-out loss at each look.
    """

    model: nn.Module
    before: float
    after: float
    best: int
    steps: int
    forwards: float
    losses: tuple[tuple[int, float], ...]


def recover(
    original: nn.Module,
    compressed: nn.Module,
    data: Any,
    *,
    steps: int = 500,
    parts: str = "all",
    loss: str = "error",
    rate: float = 1e-3,
    batch: int = 64,
    patience: int = 6,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> Recovered:
    """Train a compressed network to put out what its original does, on inputs without labels.

    This is training, and no part of `compress`. Adam with a rate that falls as a cosine; dropout is off, and batch
    norms keep their running moments. One sample in ten, of few one in five, is held out: the loss there is looked at
    about twenty times, the best network is handed back, and the one given where none is better; so on held-out samples
    it can only help.

    Args:
        original: The original network.
        compressed: The compressed one, with the same outputs; untouched.
        data: A re-iterable of batches, as for `compress`.
        steps: Most steps.
        parts: "all": every parameter; "norms": biases, and what has fewer than two axes, such as norms; "blocks": one
            block after the other from the inputs on, each towards the output of the original's block, where a block is
            a child of an `nn.Sequential` or `nn.ModuleList` that holds more layers itself, and lost no channels of its
            output; the steps are shared among them.
        loss: "error", `Σ‖y − ŷ‖² / Σ‖y‖²` of the outputs, logits without their mean over the classes; or "kl", the
            divergence of the decisions `KL(original‖compressed)`. Of blocks it is always the error.
        rate: Largest learning rate.
        batch: Most samples in a step; they are of one batch of the data, or of neighbours that fit together.
        patience: Looks without a better one after which it ends.
        seed: Seed of the order of the samples.
        told: Function that is called with the steps and the held-out loss at each look.

    Raises:
        OptionError: An option is none of those named.
        ModelError: There is nothing to train, or no block.
        DataError: No sample, or too few to hold one out; outputs of two shapes.
        NumericsError: The loss is NaN or infinite; nothing is changed.
    """
    for name, value, known in (("parts", parts, PARTS), ("loss", loss, LOSSES)):
        check_choice(f"recover.{name}", value, known)
    for name, count in (("steps", steps), ("batch", batch), ("patience", patience)):
        check_count(f"recover.{name}", count)
    check_number("recover.rate", rate, law="a learning rate above 0", cure="try 1e-3", open_low=True)
    check_seed(seed)
    original, model = check_module(original), copied(check_module(compressed))
    samples = _Samples(data, device_of(model), seed, batch)
    whole = _whole(original, model, loss, parts)
    goals = _blocks(original, model, samples) if parts == "blocks" else [whole]
    run = _Run(model, samples, batch=batch, patience=patience, told=told)
    with torch.enable_grad(), eval_mode(original), eval_mode(model):
        before = run.look(whole)
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for number, goal in enumerate(goals):
            share = steps * (number + 1) // len(goals) - steps * number // len(goals)
            run.train(goal, share, rate)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        after = run.look(whole)
        if not after <= before:  # blocks that are each better need not be so together
            return replace(run.result(before, before), model=copied(compressed), best=0)
        return run.result(before, after)


@dataclass(frozen=True, eq=False)
class _Goal:
    """What is trained, and the loss of a batch.

    Attributes:
        parameters: Parameters that are trained.
        loss: Function of a batch: the loss, to be minimised.
    """

    parameters: list[nn.Parameter]
    loss: Callable[[Batch], Tensor]


class _Samples:
    """Samples to train on and held-out ones.

    Args:
        data: The data.
        device: Where they go.
        seed: Seed of the order.
        batch: Samples of a step; neighbouring batches of one kind are put together up to it.
    """

    def __init__(self, data: Any, device: torch.device, seed: int, batch: int) -> None:
        batches = as_batches(data)
        every = held_out_of(batches)
        self._device = device
        fitted, self.held = (list(Split(batches, every, held_out=part)) for part in (False, True))
        self.fitted = merged(fitted, batch)
        sizes = [batch_size(each) for each in self.fitted]
        self.count, self.held_count = sum(sizes), sum(batch_size(each) for each in self.held)
        if not self.count or not self.held_count:
            raise DataError(
                "data",
                law="samples enough to hold some out",
                got=f"{self.count + self.held_count}",
                cure="pass more calibration inputs",
            )
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def step(self, size: int) -> Batch:
        """Samples of the next step, of one batch of the data: those of several need not have one shape."""
        if not self._order:
            self._order = torch.randperm(len(self.fitted), generator=self._generator).tolist()
        chosen = self.fitted[self._order.pop()]
        rows = torch.randperm(batch_size(chosen), generator=self._generator)[:size]
        return to_device(take(chosen, rows), self._device)

    def look(self) -> Iterator[Batch]:
        """The held-out samples."""
        return (to_device(each, self._device) for each in self.held)


class _Run:
    """Training towards one goal after another, with the best network in mind."""

    def __init__(
        self,
        model: nn.Module,
        samples: _Samples,
        *,
        batch: int,
        patience: int,
        told: Callable[[int, float], None] | None,
    ) -> None:
        self.model, self.samples, self.batch, self.patience, self._told = model, samples, batch, patience, told
        self.taken, self.work, self.best = 0, 0.0, 0
        self.losses: list[tuple[int, float]] = []

    def look(self, goal: _Goal) -> float:
        """Held-out loss."""
        with torch.no_grad():
            rows = [(batch_size(each), float(goal.loss(each))) for each in self.samples.look()]
        self.work += 2 * self.samples.held_count  # the original runs too
        value = sum(size * loss for size, loss in rows) / self.samples.held_count
        if not math.isfinite(value):
            raise NumericsError(
                "recover",
                law="the loss on held-out samples is finite",
                got=str(value),
                cure="lower the rate, or look at the outputs of both networks",
            )
        return value

    def train(self, goal: _Goal, steps: int, rate: float) -> None:
        """Steps towards a goal; its parameters end as they were at the best look."""
        for each in self.model.parameters():
            each.requires_grad_(False)
        for each in goal.parameters:
            each.requires_grad_()
        least = self.look(goal)
        self._noted(least)
        kept = [each.detach().clone() for each in goal.parameters]
        optimizer = torch.optim.Adam(goal.parameters, rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        every, without = max(1, steps // LOOKS), 0
        for step in range(1, steps + 1):
            part = self.samples.step(self.batch)
            loss = goal.loss(part)
            if not bool(torch.isfinite(loss)):
                raise NumericsError(
                    f"recover, step {self.taken + 1}",
                    law="the loss is finite",
                    got=str(float(loss.detach())),
                    cure="lower the rate",
                )
            for each in goal.parameters:
                each.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            self.taken += 1
            self.work += 4 * batch_size(part)
            if step % every == 0 or step == steps:
                reached = self.look(goal)
                self._noted(reached)
                without += 1
                if reached < least:
                    least, without, self.best = reached, 0, self.taken
                    kept = [each.detach().clone() for each in goal.parameters]
                if without >= self.patience:
                    break
        with torch.no_grad():
            for each, value in zip(goal.parameters, kept, strict=True):
                each.copy_(value)
                each.grad = None

    def _noted(self, value: float) -> None:
        self.losses.append((self.taken, value))
        if self._told is not None:
            self._told(self.taken, value)

    def result(self, before: float, after: float) -> Recovered:
        """The network as it is now."""
        total = self.samples.count + self.samples.held_count
        return Recovered(self.model, before, after, self.best, self.taken, self.work / total, tuple(self.losses))


def _whole(original: nn.Module, model: nn.Module, loss: str, parts: str) -> _Goal:
    """Towards the outputs."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ModelError(
            "compressed",
            law="weights whose gradients float16 does not round to 0",
            got="torch.float16",
            cure="train it in float32 (model.float()), and cast it back",
        )
    own = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (parts == "all" or parameter.ndim < 2 or name.endswith(".bias"))
    ]
    if not own:
        raise ModelError("compressed", law="parameters to train", got="none", cure='use parts="all"')
    return _Goal(own, lambda batch: _output_loss(loss, *_outputs(original, model, batch)))


def _outputs(original: nn.Module, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, bool]:
    with torch.no_grad():
        expected, logits = output_tensor(call(original, batch))
    got = output_tensor(call(model, batch))[0]
    check_shapes(expected, got)
    return expected, got, logits


def _output_loss(loss: str, expected: Tensor, got: Tensor, logits: bool) -> Tensor:
    expected, got = expected.float(), got.float()
    if loss == "kl":
        if not logits:
            raise OptionError(
                "recover.loss", law="outputs that are scores of classes", got="values", cure='use loss="error"'
            )
        divergence: Tensor = nn.functional.kl_div(
            got.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True
        )
        return divergence.sum(-1).mean()
    if logits:
        expected, got = (each - each.mean(-1, keepdim=True) for each in (expected, got))
    return _error(expected, got)


def _error(expected: Tensor, got: Tensor) -> Tensor:
    """`Σ‖y − ŷ‖² / Σ‖y‖²`."""
    return (expected - got).square().sum() / expected.square().sum().clamp_min(1e-30)


class _Stop(BaseException):
    """The output of a block is known: the rest of the forward pass is not needed."""


def _blocks(original: nn.Module, model: nn.Module, samples: _Samples) -> list[_Goal]:
    """Towards the output of each block, in the order in which they run."""
    paths = [
        f"{path}.{name}" if path else name
        for path, container in model.named_modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for name, child in container.named_children()
        if any(True for _ in child.children())
    ]
    paths = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    order: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: order.append(path))
        for path in paths
    ]
    try:
        with torch.no_grad():
            call(model, next(samples.look()))
    finally:
        for handle in handles:
            handle.remove()
    known = dict(original.named_modules())
    goals = []
    for path in dict.fromkeys(order):
        own = [each for each in model.get_submodule(path).parameters() if each.is_floating_point()]
        if not own or path not in known:
            continue
        pair = (original, known[path]), (model, model.get_submodule(path))
        with torch.no_grad():
            wide, narrow = (_until(network, block, next(samples.look())) for network, block in pair)
        if wide.shape == narrow.shape:  # channels of the output may have been removed
            goals.append(_Goal(own, partial(_block_loss, *pair)))
    if not goals:
        raise ModelError(
            "compressed",
            law="blocks: children of an nn.Sequential or nn.ModuleList that hold layers",
            got="none that both networks have",
            cure='use parts="all"',
        )
    return goals


def _block_loss(one: tuple[nn.Module, nn.Module], other: tuple[nn.Module, nn.Module], batch: Batch) -> Tensor:
    with torch.no_grad():
        expected = _until(*one, batch)
    return _error(expected.float(), _until(*other, batch).float())


def _until(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    """The output of a block; what comes after it does not run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output_tensor(output)[0])
        raise _Stop

    handle = block.register_forward_hook(stop)
    try:
        call(model, batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]

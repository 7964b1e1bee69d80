"""What penalties on weights share: the layers they act on, their weight beside the task's loss, and their state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rankfold.checks import check_number
from rankfold.errors import NumericsError, OptionError, SiteError, shown
from rankfold.layers import Adapter, adapter_for, tensor
from rankfold.sites.finding import check_selection
from rankfold.sites.models import uncompiled
from rankfold.training.choosing import selected

DECAY = 0.98  # share of the running means that a step keeps


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without what wraps it: `DistributedDataParallel`, `DataParallel`, `torch.compile`."""
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module:
    parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return model.get_submodule("module") if parallel else uncompiled(model)


def add(changes: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Add gradients to those that parameters have, in the memory format of the parameters."""
    for parameter, change in changes:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(change)


def check_whole(place: str, weight: Tensor) -> None:
    """Refuse a weight of which this process holds a part.

    Raises:
        SiteError: It is sharded (`fully_shard`, `FullyShardedDataParallel`, ZeRO-3).
    """
    if not _whole(weight):
        raise SiteError(
            place,
            law="every process holds the whole weight",
            got=f"a part, of shape {tuple(weight.shape)}",
            cure="train with DistributedDataParallel",
        )


def _whole(weight: Tensor) -> bool:
    """Whether a weight is neither a `DTensor`, which is not imported for the question, nor flat or taken away."""
    return not hasattr(weight, "device_mesh") and weight.ndim > 1


class Regularizer(ABC):
    """A penalty on the weights of a model that is trained, which makes it easier to compress afterwards.

    `loss = loss + penalty(model, loss)`, once for each step of the optimizer (with gradients accumulated over k
    batches, a k-th of it each time). It is `λ Σ R(W)`, summed over the layers it acts on, in float32 whatever autocast
    says; λ is a number, or such that the penalty is a share of the loss: `λ = share · mean(loss)/mean(Σ R)`, both
    running means. In a distributed run the loss of all processes counts, so that λ is one number. Layers that are
    frozen count in the sum. The means go on for as long as the object lives: a second training begins with a new one.

    Args:
        weight: λ; None with a share.
        share: Share of the loss that the penalty is held at, above 0; None with a weight.
        only: Paths or patterns (`*`, `?`) of the layers to act on; None is all that it can.
        exclude: Paths or patterns of layers to leave alone.

    Raises:
        OptionError: Neither or both of weight and share are given, or one is no positive number.
    """

    def __init__(
        self,
        weight: float | None = None,
        *,
        share: float | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        name = type(self).__name__
        if (weight is None) == (share is None):
            raise OptionError(
                name,
                law="a weight, or a share of the loss",
                got="neither" if weight is None else "both",
                cure=f"try {name}(share=0.05)",
            )
        for option, value in (("weight", weight), ("share", share)):
            if value is not None:
                check_number(f"{name}.{option}", value, law="a number above 0", cure="try 0.05", open_low=True)
        check_selection(only, exclude)
        self.weight, self.share, self.only, self.exclude = weight, share, only, tuple(exclude)
        self._means: tuple[float, float] | None = None  # running means of the loss and of the sum of the penalties

    @abstractmethod
    def penalty(self, weight: Tensor) -> Tensor | None:
        """`R(W)` of a layer.

        Args:
            weight: Canonical weight, shape (groups, out, in, kernel…), in float32 or wider, with its gradient.

        Returns:
            A scalar; None for a layer that the penalty says nothing about.
        """

    def __call__(self, model: nn.Module, loss: Tensor | None = None) -> Tensor:
        """The penalty, to be added to the loss.

        Args:
            model: The model that is trained; may be wrapped by `DistributedDataParallel` or `torch.compile`.
            loss: The loss of the task, of which the penalty is a share; not read with a weight.

        Raises:
            SiteError: A pattern matches no layer, or the penalty says nothing about any of the layers.
            OptionError: The penalty is a share of the loss, and there is none.
            NumericsError: The penalty, or the loss it is a share of, is NaN or infinite.
        """
        values = self.values(model)
        total = torch.stack([value.to(torch.float32) for value in values.values()]).sum()
        if not bool(torch.isfinite(total)):
            path = next((path for path, value in values.items() if not bool(torch.isfinite(value))), "the sum")
            raise NumericsError(
                f"{type(self).__name__} at {path!r}",
                law="the penalty is finite",
                got=str(float(values.get(path, total).detach())),
                cure="lower the learning rate or the weight; the model has diverged",
            )
        return total * self._scale(float(total.detach()), loss)

    def add_gradients(
        self, model: nn.Module, loss: Tensor | None = None, *, optimizer: Optimizer | None = None
    ) -> Tensor:
        """Add the gradient of the penalty to `.grad`, in place of a sum with the loss: once before the optimizer steps,
        when all batches of the step went backward, and before gradients are clipped.

        The same as `(loss + penalty(model, loss)).backward()`, without a hook of `DistributedDataParallel` running
        again: weights are the same in all processes, so their penalty is. Gradients must not be scaled (`GradScaler`:
        call `unscale_` first).

        Args:
            model: See `__call__`.
            loss: See `__call__`; with accumulated gradients the mean of the batches'.
            optimizer: The optimizer that steps, where a model has several: others' parameters are left alone.

        Returns:
            The penalty, detached.

        Raises:
            SiteError, OptionError, NumericsError: See `__call__`; no gradient is changed then.
        """
        value, changes = self.gradients(model, loss, optimizer=optimizer)
        add(changes)
        return value

    def gradients(
        self, model: nn.Module, loss: Tensor | None = None, *, optimizer: Optimizer | None = None
    ) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
        """What `add_gradients` adds: the penalty, detached, and its gradient for each parameter that has one."""
        held = None if optimizer is None else {id(each) for group in optimizer.param_groups for each in group["params"]}
        with torch.enable_grad():
            value = self(model, loss)
        own = [each for each in unwrapped(model).parameters() if each.requires_grad]
        chosen = [each for each in own if held is None or id(each) in held]
        if not value.requires_grad or not chosen:
            return value.detach(), []
        found = zip(chosen, torch.autograd.grad(value, chosen, allow_unused=True), strict=True)
        return value.detach(), [(each, change) for each, change in found if change is not None]

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """`R(W)` of each layer by its path, before λ.

        Raises:
            SiteError: A pattern matches no layer, or the penalty says nothing about any of the layers.
        """
        found: dict[str, Tensor] = {}
        for path, layer, adapter in self.layers(model):
            weight = adapter.canonical(layer)
            with torch.autocast(weight.device.type, enabled=False):
                value = self.penalty(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            if value is not None:
                found[path] = value
        if not found:
            raise SiteError(
                type(self).__name__,
                law="a layer that the penalty says something about",
                got="none",
                cure="look at `only`, `exclude` and the options of the penalty",
            )
        return found

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
        """Path, layer and adapter of every layer that the penalty acts on; a layer with several names, and a weight of
        several layers, has one. Tables of vectors are no maps, and left out."""
        known: dict[str, tuple[nn.Module, Adapter]] = {}
        weights: list[Tensor] = []  # held, so that the number of one that is computed is no other's
        for path, layer in unwrapped(model).named_modules():
            adapter = adapter_for(layer)
            if adapter is None or any(is_lazy(each) for each in layer.parameters(recurse=False)):
                continue
            weight = tensor(layer, "weight")
            table = _whole(weight) and weight.numel() and adapter.geometry(layer).table is not None
            if table or any(weight is each for each in weights) or (_whole(weight) and not weight.numel()):
                continue  # a table has rows, and no map; a weight of two layers counts once
            weights.append(weight)
            known[path] = layer, adapter
        for path in selected(known, only=self.only, exclude=self.exclude, place=type(self).__name__):
            check_whole(f"{type(self).__name__} at {path!r}", tensor(known[path][0], "weight"))
            yield path, *known[path]

    def _scale(self, total: float, loss: Tensor | None) -> float:
        """λ; with a share after taking the step into the running means."""
        if self.weight is not None:
            return self.weight
        if loss is None:
            raise OptionError(
                type(self).__name__,
                law="the loss is passed, of which the penalty is a share",
                got="none",
                cure="call penalty(model, loss), or give a weight",
            )
        if not isinstance(loss, Tensor):
            raise OptionError(
                type(self).__name__,
                law="the loss is a tensor",
                got=shown(loss),
                cure="pass what backward() is called on",
            )
        told = loss.detach().to(torch.float32).mean()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            told = told.clone()
            dist.all_reduce(told)
            told = told / dist.get_world_size()
        level = abs(float(told))
        if not math.isfinite(level):
            raise NumericsError(
                f"{type(self).__name__}: the loss",
                law="the loss of which the penalty is a share is finite",
                got=str(float(told)),
                cure="lower the learning rate; the model has diverged",
            )
        if torch.is_grad_enabled():
            old = (level, total) if self._means is None else self._means
            self._means = DECAY * old[0] + (1 - DECAY) * level, DECAY * old[1] + (1 - DECAY) * total
        means = self._means or (level, total)
        return float(self.share or 0.0) * means[0] / means[1] if means[1] > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The running means, with which training goes on as if it had not been stopped."""
        return {"means": None if self._means is None else list(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` gave."""
        means = state["means"]
        self._means = None if means is None else (float(means[0]), float(means[1]))

"""Running a model on a batch, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.data.batches import Batch, cloned, split_batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch; a model that writes into its inputs changes the batch."""
    args, kwargs = split_batch(batch)
    return model(*args, **kwargs)


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch, which is left as it was."""
    return call(model, cloned(batch))


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a model without any."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, no gradients, nothing compiled; outside, every module's own mode and every buffer as it was."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    buffers = [
        (module, name, buffer, buffer.detach().clone() if buffer is not None and _is_plain(buffer) else None)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    model.eval()
    for module, _ in compiled:  # what `model.compile()` left behind
        module._compiled_call_impl = None
    try:
        with torch.no_grad():
            yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:  # some models count or cache in their forward
            module._buffers[name] = buffer
            if buffer is not None and buffer.grad_fn is not None and not buffer._is_view():
                buffer.detach_()  # written into while gradients were on
            if buffer is not None and value is not None and not _same(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _is_plain(buffer: Tensor) -> bool:
    """Whether a buffer has elements that can be kept and compared."""
    return not is_lazy(buffer) and not buffer.is_meta and buffer.layout is torch.strided and type(buffer) is Tensor


def _same(buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer still has its bits; one that is not finite is written back anyway."""
    return buffer.shape == value.shape and torch.equal(buffer, value)

"""One functional graph of the model's forward, through `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rankfold.errors import DataError

Batch: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Graph:
    """The traced forward, or the reason why there is none.

    Attributes:
        program: The functional program with dotted parameter names, or None.
        reason: Why the model does not export; None where it does.
        static_batch: The batch size the program is bound to, or None where any batch goes through.
    """

    program: ExportedProgram | None
    reason: str | None = None
    static_batch: int | None = None


def split_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of calibration data as (positional, keyword) arguments of the model.

    A tensor is the input; of a tuple or list the first item is (the rest, e.g. labels, is left out); a mapping is
    keyword arguments.

    Raises:
        DataError: Anything else.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        return split_batch(batch[0])
    if isinstance(batch, Mapping) and batch and all(isinstance(key, str) for key in batch):
        if not any(isinstance(value, Tensor) for value in batch.values()):
            raise DataError(
                "data",
                law="a dict batch holds at least one tensor",
                got=f"keys {sorted(batch)}",
                cure="yield dicts of the model's keyword arguments",
            )
        return (), dict(batch)
    raise DataError(
        "data",
        law="a batch is a tensor, a tuple whose first item is the input, or a dict of keyword arguments",
        got=type(batch).__name__,
        cure="yield one of these from the data",
    )


def batch_size(batch: Batch) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    args, kwargs = split_batch(batch)
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if first.ndim == 0 or first.shape[0] == 0:
        raise DataError(
            "data",
            law="a batch holds at least one sample along its first axis",
            got=f"shape {tuple(first.shape)}",
            cure="yield tensors whose first axis is the batch",
        )
    return int(first.shape[0])


def take(batch: Batch, index: Tensor) -> Batch:
    """The samples `index` of a batch; tensors whose first axis is not the batch go through whole."""
    size = batch_size(batch)

    def pick(value: Any) -> Any:
        per_sample = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return value[index.to(value.device)] if per_sample else value

    args, kwargs = split_batch(batch)
    return pick(args[0]) if args else {name: pick(value) for name, value in kwargs.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The model's inputs of a batch, on a device."""
    args, kwargs = split_batch(batch)

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return move(args[0]) if args else {name: move(value) for name, value in kwargs.items()}


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch."""
    args, kwargs = split_batch(batch)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a model without any."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again outside; no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def trace(model: nn.Module, example: Batch) -> Graph:
    """Export the forward in eval mode, with the batch axis free where the model lets it.

    The program is functional (`run_decompositions({})`): no operator writes into a value that is still needed. The
    model is left as it was, its training modes too.

    Args:
        model: The model.
        example: One batch; two samples of it are used.

    Returns:
        The graph; where the export fails, one without a program and with the reason.
    """
    size = batch_size(example)
    pair = take(example, torch.arange(2) % size)
    args, kwargs = split_batch(to_device(pair, device_of(model)))
    shapes = [_free_batch(args), _free_batch(kwargs)]
    dynamic: Any = tuple(shapes[0]) if args else shapes[1]
    failures = []
    for dims in (dynamic, None):
        try:
            with evaluating(model), warnings.catch_warnings(), _quiet_logs():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dims, strict=False)
                program = program.run_decompositions({})
            return Graph(program, static_batch=None if dims is not None else 2)
        except Exception as cause:  # noqa: BLE001 - whatever the exporter throws, the hook road still serves
            failures.append(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}")
    return Graph(None, reason=f"torch.export failed ({failures[-1][:300]})")


def _free_batch(values: tuple[Any, ...] | dict[str, Any]) -> Any:
    """Dynamic-shape spec that frees the first axis of every tensor of the batch's size."""

    def free(value: Any) -> Any:
        per_sample = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2
        return {0: Dim.DYNAMIC} if per_sample else None

    if isinstance(values, dict):
        return {name: free(value) for name, value in values.items()}
    return [free(value) for value in values]


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the exporter's own log lines off the terminal while it tries."""
    import logging

    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

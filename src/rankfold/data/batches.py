"""Batches of calibration data: the inputs that the model gets of them, and samples of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rankfold.errors import DataError

Batch: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def split_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch of calibration data as (positional, keyword) arguments of the model.

    A tensor is the input; of a tuple or list the first item is (the rest, e.g. labels, is left out); a mapping is
    keyword arguments.

    Raises:
        DataError: The batch is anything else.
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


def labels_of(batch: Any) -> Tensor | None:
    """Integer labels of a batch: the second item of a tuple, or the entry "labels" of a dict."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    elif isinstance(batch, Mapping):
        label = batch.get("labels")
    else:
        return None
    integer = isinstance(label, Tensor) and not label.is_floating_point() and label.dtype != torch.bool
    return label if integer else None


def with_labels(batch: Batch, rows: Tensor) -> Batch:
    """Samples of a batch with their labels."""
    label = labels_of(batch)
    if label is None or isinstance(batch, Mapping) or label.shape[:1] != (batch_size(batch),):
        return take(batch, rows)
    return take(batch, rows), label[rows.to(label.device)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The model's inputs of a batch, on a device."""
    return _mapped(batch, lambda tensor: tensor.to(device))


def cloned(batch: Batch) -> Batch:
    """The model's inputs of a batch in memory of their own."""
    return _mapped(batch, torch.clone)


def _mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    args, kwargs = split_batch(batch)

    def through(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    return through(args[0]) if args else {name: through(value) for name, value in kwargs.items()}


def micro_batches(batches: Iterator[Batch], size: int) -> Iterator[tuple[Batch, range]]:
    """Batches cut into near-equal parts of at most `size` samples, with the positions of their samples in the data."""
    start = 0
    for batch in batches:
        whole = batch_size(batch)
        parts = -(-whole // size)
        if parts == 1:
            yield batch, range(start, start + whole)  # as it is: no second copy of the data
            start += whole
            continue
        for chunk in torch.arange(whole).chunk(parts):
            yield take(batch, chunk), range(start + int(chunk[0]), start + int(chunk[-1]) + 1)
        start += whole

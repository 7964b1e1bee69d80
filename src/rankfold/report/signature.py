"""The inputs of a model: shapes and dtypes of one batch, so that an example can be built without the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankfold.checks import is_whole
from rankfold.data.batches import Batch, batch_size, split_batch
from rankfold.errors import DataError


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a batch.

    Attributes:
        shape: Shape of the tensor, the axis of samples included.
        dtype: Name of the dtype in torch: "float32".
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """The inputs of a model's forward.

    Attributes:
        samples: Number of samples in the batch that was looked at.
        args: Positional tensors.
        kwargs: Tensors by keyword.
        left_out: Keywords of arguments that are no tensors; the model must do without them, or be given them.
    """

    samples: int
    args: tuple[TensorSpec, ...] = ()
    kwargs: Mapping[str, TensorSpec] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> Signature:
        """The signature of a batch of calibration data."""
        args, kwargs = split_batch(batch)
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        return cls(
            batch_size(batch),
            tuple(_spec(value) for value in args if isinstance(value, Tensor)),
            {name: _spec(value) for name, value in tensors.items()},
            tuple(sorted(set(kwargs) - set(tensors))),
        )

    def example(self, samples: int = 1) -> Batch:
        """A batch of zeros; tensors whose first axis was the samples get `samples` of them.

        Raises:
            DataError: `samples` is no whole number above 0.
        """
        if not is_whole(samples) or samples < 1:
            raise DataError("samples", law="a whole number of at least 1", got=repr(samples), cure="pass 1")

        def zeros(spec: TensorSpec) -> Tensor:
            first = spec.shape[:1] == (self.samples,)
            shape = (samples, *spec.shape[1:]) if first else spec.shape
            return torch.zeros(shape, dtype=getattr(torch, spec.dtype))

        if self.args:
            return zeros(self.args[0])
        batch: dict[str, Any] = {name: zeros(spec) for name, spec in self.kwargs.items()}
        return batch


def _spec(value: Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), str(value.dtype).removeprefix("torch."))

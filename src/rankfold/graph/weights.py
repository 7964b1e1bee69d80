"""A network's tensors by name: in its modules, or in files that are read when a tensor is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankfold.errors import DataError

Weights: TypeAlias = Mapping[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """The parameters and buffers of a model under all their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


class StoredWeights(Mapping[str, Tensor]):
    """Tensors in safetensors files; one is read anew each time it is asked for, so none stays in memory.

    Args:
        files: Files that hold each name once, such as the shards of a checkpoint.
        device: Device that tensors are read to.

    Raises:
        DataError: A name stands in two of the files.
    """

    def __init__(self, files: Iterable[str | Path], device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self._where: dict[str, Path] = {}
        for file in map(Path, files):
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if name in self._where:
                        got = f"{self._where[name]} and {file}"
                        raise DataError(repr(name), law="each name is in one file", got=got, cure="give one of the two")
                    self._where[name] = file

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, read from its file."""
        with safe_open(str(self._where[name]), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._where)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._where)

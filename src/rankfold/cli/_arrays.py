"""A `.npz` as data."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli._data import DataOptions, spread
from rankfold.cli._errors import first_line
from rankfold.errors import DataError

if TYPE_CHECKING:
    import torch

INPUTS = ("inputs", "x", "images")


def npz_batches(path: Path, options: DataOptions, dtype: torch.dtype, *, labels: bool) -> list[Any]:
    """Batches of a `.npz`: one array of inputs (and labels), or keyword arguments by the names of the arrays."""
    import numpy as np
    import torch

    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as cause:
        raise DataError(
            str(path), law="a .npz of plain arrays", got=first_line(cause), cure="write it with numpy.savez"
        ) from cause
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or len(set(counts.values())) != 1 or min(counts.values()) == 0:
        raise DataError(
            str(path),
            law="every array has one row a sample",
            got=", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no array",
            cure=f"name the input one of {', '.join(INPUTS)}, or each array like a keyword argument of the model",
        )
    chosen = spread(min(counts.values()), options.limit)
    try:
        tensors = {name: torch.from_numpy(array[chosen]) for name, array in arrays.items()}
    except TypeError as cause:
        raise DataError(
            str(path), law="arrays of numbers", got=first_line(cause), cure="write numbers, not text or objects"
        ) from cause
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    answers = tensors.pop("labels", None)
    name = next(iter(tensors)) if len(tensors) == 1 and set(tensors) <= set(INPUTS) else None
    pieces: list[Any] = []
    for start in range(0, len(chosen), options.step):
        part = slice(start, start + options.step)
        if name is None:
            own = {key: tensor[part] for key, tensor in tensors.items()}
            pieces.append({**own, "labels": answers[part]} if labels and answers is not None else own)
        elif answers is not None and labels:
            pieces.append((tensors[name][part], answers[part].long()))
        else:
            pieces.append(tensors[name][part])
    return pieces

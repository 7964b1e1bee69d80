"""Arrays in a file as data: a `.npz` of several, a `.npy` of one."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli._data_options import DataOptions, spread
from rankfold.cli._errors import first_line
from rankfold.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

INPUTS = ("inputs", "x", "images")
ANSWERS = ("labels", "label", "targets", "target", "y")


def array_batches(
    path: Path, options: DataOptions, dtype: torch.dtype, *, labels: bool, names: Collection[str] | None = None
) -> list[Any]:
    """Batches of a `.npy` (the inputs), or of a `.npz`.

    In a `.npz`, arrays named as arguments of the model's forward are keyword arguments. An array of whole numbers that
    is named as one of `ANSWERS`, and is no argument, is the labels; one array beside it is the input, by whatever name.

    Args:
        path: The file.
        options: Options of the batches.
        dtype: Dtype that floating inputs are converted to.
        labels: True if labels are wanted.
        names: Names of the arguments that the model's forward takes; None takes any.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    import torch

    arrays = _read(path)
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
    answers = _answers(tensors, names)
    name = _input_name(path, tensors, names)
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
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


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    import numpy as np

    single = path.suffix.lower() == ".npy"
    try:
        with path.open("rb") as opened:
            if single:
                return {INPUTS[0]: np.lib.format.read_array(opened, allow_pickle=False)}
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as cause:
        raise DataError(
            str(path),
            law="a .npy of one plain array" if single else "a .npz of plain arrays",
            got=first_line(cause),
            cure=f"write it with {'numpy.save' if single else 'numpy.savez'}",
        ) from cause


def _answers(tensors: dict[str, torch.Tensor], names: Collection[str] | None) -> torch.Tensor | None:
    """The labels, taken out of the arrays."""
    for name in ANSWERS:
        if len(tensors) > 1 and name in tensors and (name == ANSWERS[0] or _is_label(name, tensors, names)):
            return tensors.pop(name)
    return None


def _is_label(name: str, tensors: dict[str, torch.Tensor], names: Collection[str] | None) -> bool:
    tensor = tensors[name]
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and (len(tensors) == 2 if names is None else name not in names)


def _input_name(path: Path, tensors: dict[str, torch.Tensor], names: Collection[str] | None) -> str | None:
    """The one array that is the input by position; None where all are keyword arguments.

    Raises:
        DataError: There are several arrays, and one of them is no argument of the model's forward.
    """
    (first, *others) = tensors
    if not others and (first in INPUTS or (names is not None and first not in names)):
        return first
    unknown = [] if names is None else [name for name in tensors if name not in names]
    if unknown:
        raise DataError(
            str(path),
            law="several arrays are named like arguments of the model's forward",
            got=f"{unknown[0]!r} beside {', '.join(map(repr, (name for name in tensors if name != unknown[0])))}",
            cure=f"rename them; the forward takes {', '.join(names or ())}. Labels are whole numbers named"
            f" {ANSWERS[0]!r} or {ANSWERS[-1]!r}",
        )
    return None

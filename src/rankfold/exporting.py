"""A model as one file for other runtimes: ONNX, or an exported program of torch. Checked before it is there."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rankfold.checks import check_flag, check_number
from rankfold.data.batches import Batch, batch_size, split_batch, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import DependencyError, OptionError, SelfCheckError, TraceError, WriteError, shown
from rankfold.serialization import flush
from rankfold.sites.models import check_module

KINDS = (".onnx", ".pt2")
INLINE = 1 << 30  # bytes of weights from which they lie in a file of their own, FILE.data (one file holds 2 GB)

Runner = Callable[[Batch], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        bytes: Its size, with that of the weights where they lie beside it.
        inputs: Names of the inputs, in their order.
        outputs: Names of the outputs, in their order.
        dynamic_batch: Whether it takes any number of samples at once.
        checked: Numbers of samples at which it was run beside the model.
        difference: Largest difference of an output's element from the model's, over the largest element.
    """

    path: Path
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    checked: tuple[int, ...]
    difference: float


def export(
    model: nn.Module,
    path: str | Path,
    example: Batch,
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model for another runtime, and run both on the example before the file is in its place.

    `.onnx` is written by `torch.onnx` and run in onnxruntime (`pip install 'rankfold[onnx]'`), `.pt2` by
    `torch.export`. Of a dynamic batch one sample, those of the example and one more are run. The largest difference
    `max|y − ŷ| / max|y|` of each floating output is at most the tolerance; other outputs are equal.

    Args:
        model: Any model; of a checkpoint, what `rankfold.load` returned. Untouched.
        path: File to write. Weights of a gigabyte and more lie beside an `.onnx`, in `FILE.data`.
        example: One batch, as of `compress`.
        dynamic_batch: True for a file that takes any number of samples along the first axis; False for that of the
            example alone.
        tolerance: Largest difference; None is the root of the dtype's precision, 3.5e-4 in float32.
        overwrite: True to replace a file that is there.

    Raises:
        OptionError: The suffix is neither of the two, or an option is none of those named.
        DataError: The example is no batch.
        DependencyError: onnx, onnxscript or onnxruntime is not installed.
        TraceError: torch cannot export the model; what it said is given.
        SelfCheckError: The file does not give what the model gives.
        WriteError: The file is there, or cannot be written; nothing half-written is left.
    """
    check_flag("export.dynamic_batch", dynamic_batch)
    check_flag("export.overwrite", overwrite)
    if tolerance is not None:
        check_number("export.tolerance", tolerance, law="a number above 0", cure="leave it out", open_low=True)
    target = _target(path, overwrite=overwrite)
    kind = target.suffix.lower()
    model = check_module(model)
    batch = to_device(example, device_of(model))
    if kind == ".onnx":
        _onnxruntime()
        _check_dtypes(model)
    size = batch_size(batch)
    sizes = tuple(dict.fromkeys((size, 1, size + 1))) if dynamic_batch else (size,)
    with evaluating(model):
        expected = [_expected(model, _sized(batch, each), own=each == size) for each in sizes]
        program = _program(model, _sized(batch, max(2, size)) if dynamic_batch else batch, dynamic_batch)
        names = tuple(_named(run(model, batch)))
    if tolerance is None:
        floating = {each.dtype for _, outputs in expected for each in outputs if each.is_floating_point()}
        tolerance = max((torch.finfo(dtype).eps for dtype in floating), default=0.0) ** 0.5
    with _aside(target) as file:
        inputs, runner = (_write_onnx if kind == ".onnx" else _write_program)(program, model, file, names)
        difference = max(_difference(target, *pair, runner, tolerance) for pair in expected)
        written = sum(each.stat().st_size for each in file.parent.iterdir())
    return Exported(target, written, inputs, names, dynamic_batch, sizes, difference)


def _target(path: str | Path, *, overwrite: bool) -> Path:
    """The file to write."""
    if not isinstance(path, (str, Path)):
        raise OptionError("export.path", law="a path", got=shown(path), cure='try "small.onnx"')
    target = Path(path).resolve()
    if target.suffix.lower() not in KINDS:
        raise OptionError(
            str(path),
            law="a file that ends in .onnx or .pt2",
            got=target.suffix or "no suffix",
            cure='try "small.onnx"',
        )
    if not target.parent.is_dir():
        raise WriteError(
            str(path), law="a file in a directory that is there", got=f"no {target.parent}", cure="make it"
        )
    if target.is_dir() or (target.exists() and not overwrite):
        cure = "choose another file" if target.is_dir() else "choose another file, or overwrite=True"
        raise WriteError(str(path), law="a new file", got="one that is there", cure=cure)
    return target


def _onnxruntime() -> Any:
    """The runtime, if all that writes and runs ONNX is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as cause:
        raise DependencyError(
            "export",
            law="onnx, onnxscript and onnxruntime write ONNX and run it",
            got=str(cause),
            cure="pip install 'rankfold[onnx]', or export to .pt2",
        ) from cause
    return onnxruntime


def _check_dtypes(model: nn.Module) -> None:
    """Refuse bfloat16, which onnxruntime does not run on a CPU."""
    for name, each in model.state_dict().items():
        if isinstance(each, Tensor) and each.dtype == torch.bfloat16:
            raise OptionError(
                f"export at {name!r}",
                law="float32 or float16, which onnxruntime runs",
                got="bfloat16",
                cure="export model.float(), or to .pt2",
            )


def _sized(batch: Batch, size: int) -> Batch:
    """So many samples of a batch, its own over again where it has fewer."""
    return take(batch, torch.arange(size) % batch_size(batch))


def _expected(model: nn.Module, batch: Batch, *, own: bool) -> tuple[Batch, list[Tensor]]:
    """A batch and what the model makes of it."""
    try:
        return batch, _outputs(run(model, batch))
    except Exception as cause:
        if own:
            raise
        raise TraceError(
            "export",
            law="the model runs on any number of samples",
            got=f"{_first_line(cause)} on {batch_size(batch)}",
            cure="try dynamic_batch=False, for the number of samples of the example",
        ) from cause


def _outputs(output: Any) -> list[Tensor]:
    """All tensors of an output, in the order in which runtimes give them."""
    return [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]


def _named(output: Any) -> Iterator[str]:
    """A name for each tensor of an output: the last key of its path that has one, or `output`, each once."""
    known: set[str] = set()
    for path, value in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(value, Tensor):
            keys = [str(key.key) for key in path if isinstance(key, pytree.MappingKey)]
            stem = name = keys[-1] if keys else "output"
            number = 0
            while name in known:
                number += 1
                name = f"{stem}_{number}"
            known.add(name)
            yield name


def _program(model: nn.Module, batch: Batch, dynamic: bool) -> torch.export.ExportedProgram:
    """The model as torch follows it."""
    args, kwargs = split_batch(batch)
    size, axis = batch_size(batch), torch.export.Dim("batch", min=1)

    def shape(value: Any) -> Any:
        return {0: axis} if isinstance(value, Tensor) and value.ndim and len(value) == size else None

    shapes = (tuple(map(shape, args)), {name: shape(value) for name, value in kwargs.items()})
    dynamic_shapes = (shapes[0] if args else shapes[1]) if dynamic else None
    try:
        with _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as cause:
        raise TraceError(
            "export",
            law="torch.export follows the model" + (" for any number of samples" if dynamic else ""),
            got=_first_line(cause),
            cure="try dynamic_batch=False, for the number of samples of the example"
            if dynamic
            else "see rankfold inspect for where it stops",
        ) from cause


def _write_onnx(
    program: torch.export.ExportedProgram, model: nn.Module, file: Path, names: Sequence[str]
) -> tuple[tuple[str, ...], Runner]:
    """Write ONNX; the names of its inputs, and what runs it."""
    beside = sum(each.nbytes for each in model.state_dict().values() if isinstance(each, Tensor)) >= INLINE
    try:
        with _quiet():
            torch.onnx.export(
                program, f=str(file), dynamo=True, external_data=beside, verbose=False, output_names=list(names)
            )
    except Exception as cause:
        raise TraceError(
            "export", law="every operator has a form in ONNX", got=_first_line(cause), cure="export to .pt2"
        ) from cause
    try:
        session = _onnxruntime().InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise TraceError(
            "export", law="onnxruntime runs what was written", got=_first_line(cause), cure="export to .pt2"
        ) from cause
    inputs = tuple(each.name for each in session.get_inputs())

    def runner(batch: Batch) -> list[Tensor]:
        args, kwargs = split_batch(batch)
        given = {**dict(zip(inputs, args, strict=False)), **kwargs}
        arrays = {name: given[name].detach().cpu().numpy() for name in inputs}
        return [torch.from_numpy(np.asarray(each)) for each in session.run(None, arrays)]

    return inputs, runner


def _write_program(
    program: torch.export.ExportedProgram, model: nn.Module, file: Path, names: Sequence[str]
) -> tuple[tuple[str, ...], Runner]:
    """Write a program of torch; the names of its inputs, and what runs it."""
    with _quiet():
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
    return program.graph_signature.user_inputs, lambda batch: _outputs(run(loaded, batch))


def _difference(target: Path, batch: Batch, expected: list[Tensor], runner: Runner, tolerance: float) -> float:
    """Largest difference of an output."""
    got = [each.detach().cpu() for each in runner(batch)]
    expected = [each.detach().cpu() for each in expected]
    if [each.shape for each in got] != [each.shape for each in expected]:
        raise _fails(target, f"shapes {[tuple(e.shape) for e in got]} for {[tuple(e.shape) for e in expected]}")
    largest = 0.0
    for index, (mine, theirs) in enumerate(zip(expected, got, strict=True)):
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs.to(mine.dtype)):
                raise _fails(target, f"other values of output {index}")
            continue
        scale = float(mine.abs().max()) if mine.numel() else 0.0
        apart = float((mine.double() - theirs.double()).abs().max()) if mine.numel() else 0.0
        relative = apart / scale if scale > 0 else apart
        if not relative <= tolerance:
            raise _fails(
                target, f"output {index} {relative:.2g} apart on {batch_size(batch)} samples (at most {tolerance:.2g})"
            )
        largest = max(largest, relative)
    return largest


def _fails(target: Path, got: str) -> SelfCheckError:
    return SelfCheckError(
        target.name,
        law="the file gives what the model gives",
        got=got,
        cure="export to the other format, and report this",
    )


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A file of the same name in a directory beside it, whose content goes to its place at the end, or nowhere."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            yield Path(folder) / target.name
            for file in sorted(Path(folder).iterdir(), key=lambda each: each.name == target.name):  # weights first
                flush(file)
                os.replace(file, target.parent / file.name)
    except OSError as cause:
        raise WriteError(
            str(target), law="the file can be written", got=str(cause), cure="check the free space"
        ) from cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings of torch's exporter about its own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(cause: BaseException) -> str:
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text.splitlines()[0][:200] if text else ''}"

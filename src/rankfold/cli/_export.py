"""`rankfold export`: a model or checkpoint as a file for another runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli import _options as o
from rankfold.cli._data import DataSpec
from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import exit_codes
from rankfold.cli._models import ModelSpec
from rankfold.cli._output import emit, emit_json, stdout_kept_clean
from rankfold.progress import progress_bar


def export(
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file: .onnx or .pt2.")],
    weights: o.Weights = None,
    factory: o.Factory = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Take as many samples as the first batch has, and no other number.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    batch_size: o.BatchSize = None,
    limit: o.Limit = None,
    size: o.Size = 224,
    mean: o.Mean = o.IMAGENET_MEAN,
    std: o.Std = o.IMAGENET_STD,
    length: o.Length = 128,
    json: o.Json = False,
    traceback: o.Traceback = False,
) -> None:
    """Write MODEL for another runtime, checked on the first batch of DATA before the file is in its place."""
    with exit_codes(show_traceback=traceback):
        options = DataOptions.parse(batch_size=batch_size, limit=limit, size=size, mean=mean, std=std, length=length)
        spec = ModelSpec.parse(model, weights=weights, factory=factory)
        source = DataSpec.parse(data, options)
        with progress_bar() as progress, stdout_kept_clean():
            from rankfold.data.splits import as_batches
            from rankfold.exporting import export as written

            with progress("load", None):
                loaded = spec.load(seed=seed, device=o.parse_device(device))
            batches = as_batches(
                source.open(
                    options,
                    tokenizer=spec.directory,
                    dtype=o.weight_dtype(loaded),
                    labels=False,
                    causal=o.is_causal(loaded),
                    names=o.forward_names(loaded),
                )
            )
            with progress("export", None):
                done = written(loaded, out, next(iter(batches)), dynamic_batch=not fixed_batch, overwrite=overwrite)
        if json:
            emit_json({"version": 1, **asdict(done), "path": str(done.path), "notes": list(spec.notes)})
            return
        sizes = "any number of samples" if done.dynamic_batch else f"{done.checked[0]} samples"
        emit(
            f"{done.path}  {done.bytes:,} bytes, {sizes}\n"
            f"inputs {', '.join(done.inputs)}; outputs {', '.join(done.outputs)}\n"
            f"run beside the model on {', '.join(map(str, done.checked))} samples: "
            f"largest difference {done.difference:.2g} of the largest output"
            + "".join(f"\nnote: {note}" for note in spec.notes)
        )

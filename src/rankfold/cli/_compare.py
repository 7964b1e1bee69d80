"""`rankfold compare`: two models side by side on data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli import _options as o
from rankfold.cli._data import DataSpec, notes_of
from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import exit_codes, first_line
from rankfold.cli._models import ModelSpec
from rankfold.cli._names import parse_outputs
from rankfold.cli._output import emit, emit_json, stdout_kept_clean
from rankfold.cli._progress import Watched, expected
from rankfold.errors import RankfoldError, TraceError
from rankfold.progress import Progress, progress_bar

if TYPE_CHECKING:
    from rankfold.comparison.compare import Comparison
    from rankfold.cost.latency import Latency
    from rankfold.cost.resources import Cost
    from rankfold.outputs.taken import Outputs

SHOWN = 10  # indices of changed examples in the text; JSON has all


@dataclass(frozen=True)
class Result:
    """The result that is printed.

    Attributes:
        specs: Specifications of the original and the compressed model.
        costs: Costs of the two.
        comparison: Comparison on the data.
        latency: Time of the compressed forward over the original's, and its spread.
        data: Remarks on the data that a reader must know.
    """

    specs: tuple[ModelSpec, ModelSpec]
    costs: tuple[Cost, Cost]
    comparison: Comparison
    latency: Latency
    data: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Remarks that a reader must know, each once."""
        return list(dict.fromkeys([*(note for spec in self.specs for note in spec.notes), *self.data]))


def compare(
    original: o.Model,
    compressed: Annotated[
        str,
        typer.Argument(
            metavar="COMPRESSED",
            help="Another model, named in the same ways. A checkpoint is built by ORIGINAL unless --factory says how.",
        ),
    ],
    data: o.Data,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Trained weights of the original, a safetensors file."),
    ] = None,
    factory: o.Factory = None,
    outputs: o.OutputKinds = None,
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
    """Compare two models on DATA: decisions, outputs, accuracy where there are labels, size and speed."""
    with exit_codes(show_traceback=traceback):
        options = DataOptions.parse(batch_size=batch_size, limit=limit, size=size, mean=mean, std=std, length=length)
        first, second = _parse(original, compressed, weights=weights, factory=factory)
        source = DataSpec.parse(data, options)
        kinds = parse_outputs(outputs)
        with progress_bar() as progress, stdout_kept_clean():
            result = _run((first, second), source, options, outputs=kinds, device=device, seed=seed, progress=progress)
        if json:
            emit_json(_as_json(result))
        else:
            emit(_as_text(result))


def _parse(original: str, compressed: str, *, weights: Path | None, factory: str | None) -> tuple[ModelSpec, ModelSpec]:
    """Both models. `--factory` goes to the checkpoints among them; without it the original builds the compressed."""
    first_is, second_is = (ModelSpec.is_checkpoint(text) for text in (original, compressed))
    first = ModelSpec.parse(original, weights=weights, factory=factory if first_is or not second_is else None)
    return first, ModelSpec.parse(compressed, factory=(factory or original) if second_is else None)


def _run(
    specs: tuple[ModelSpec, ModelSpec],
    source: DataSpec,
    options: DataOptions,
    *,
    outputs: Outputs,
    device: str,
    seed: int,
    progress: Progress,
) -> Result:
    from rankfold.comparison.compare import compare as compare_models
    from rankfold.cost.counted import count
    from rankfold.cost.latency import latency_ratio
    from rankfold.data.splits import as_batches

    place = o.parse_device(device)
    with progress("load", None):
        first, second = (spec.load(seed=seed, device=place) for spec in specs)
    causal = o.is_causal(first)
    batches = as_batches(
        source.open(
            options,
            tokenizer=specs[0].directory,
            dtype=o.weight_dtype(first),
            labels=True,
            causal=causal,
            names=o.forward_names(first),
        )
    )
    try:
        with progress("compare", expected(batches)) as advance:
            seen = compare_models(first, second, Watched(batches, advance), outputs=outputs)
        example = next(iter(batches))
        costs = count(first, example), count(second, example)
        with progress("latency", None):
            ratio = latency_ratio(first, second, example)
    except RankfoldError:
        raise
    except Exception as cause:
        raise TraceError(
            source.text,
            law="both models run on every batch",
            got=first_line(cause),
            cure="check the shape, the names and the kind of the inputs",
        ) from cause
    return Result(specs, costs, seen, ratio, notes_of(batches))


def _as_json(result: Result) -> dict[str, Any]:
    sides = {
        name: {"model": spec.text, "weights": spec.origin, "cost": cost.amounts()}
        for name, spec, cost in zip(("original", "compressed"), result.specs, result.costs, strict=True)
    }
    return {
        "version": 1,
        **sides,
        "comparison": result.comparison.to_json(),
        "latency": result.latency.ratio,
        "latency_spread": [result.latency.lower, result.latency.upper],
        "notes": result.notes,
    }


def _as_text(result: Result) -> str:
    seen, (first, second) = result.comparison, result.costs
    lines = [
        f"original    {result.specs[0].text}",
        f"compressed  {result.specs[1].text}",
        "",
        f"outputs     taken for {seen.taken_for}",
        f"samples     {seen.samples:,}",
    ]
    if seen.agreement is not None:
        lines.append(f"agreement   {seen.agreement:.4f} of {seen.examples:,} examples")
    if seen.changed:
        more = ", …" if len(seen.changed) > SHOWN else ""
        lines.append(f"changed     {len(seen.changed):,}: {', '.join(map(str, seen.changed[:SHOWN]))}{more}")
    for name, pair, digits in (("top-1", seen.top1, 4), ("top-5", seen.top5, 4), ("perplexity", seen.perplexity, 3)):
        if pair is not None:
            lines.append(f"{name:<12}{pair[0]:.{digits}f} → {pair[1]:.{digits}f}")
    if seen.kl is not None:
        lines.append(f"KL          {seen.kl:.3g} nats an example")
    lines.append(f"difference  relative error {seen.relative_error:.3g}, largest difference {seen.max_difference:.3g}")
    several = len(seen.outputs) > 1
    for each in seen.outputs:
        figures = [f"relative error {each.relative_error:.3g}"] if several else []
        figures += [f"agreement {each.agreement:.4f}"] if several and each.agreement is not None else []
        figures += [f"mean cosine {each.cosine:.4f}"] if each.cosine is not None else []
        if figures:
            lines.append(f"of {each.name + ' ':<9}{', '.join(figures)}")
    for name, before in first.amounts().items():
        after = second.amounts()[name]
        lines.append(f"{name:<12}{before:,} → {after:,}   {after / max(before, 1):.3f} kept")
    latency = result.latency
    lines.append(
        f"latency     {latency.ratio:.2f} of the original's (quartiles {latency.lower:.2f} and {latency.upper:.2f}), "
        "measured in turn on one batch"
    )
    notes = [f"outputs that were not looked at: {', '.join(seen.passed)}"] if seen.passed else []
    return "\n".join([*lines, *(f"note: {note}" for note in (*notes, *result.notes))])

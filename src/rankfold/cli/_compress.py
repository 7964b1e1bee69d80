"""`rankfold compress`: a model and a budget in, a checkpoint directory out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli import _options as o
from rankfold.cli._data import DataSpec, notes_of
from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import UsageError, exit_codes
from rankfold.cli._models import ModelSpec
from rankfold.cli._names import parse_budget, parse_limit, parse_method, parse_outputs, parse_positions
from rankfold.cli._out import check_out
from rankfold.cli._output import emit, emit_json, stdout_kept_clean, width
from rankfold.cli._progress import expected, totalled
from rankfold.cli._together import process_group
from rankfold.errors import SiteError
from rankfold.progress import Progress, progress_bar

if TYPE_CHECKING:
    from torch import nn

    from rankfold.api import Compressed
    from rankfold.plan import Plan

BUDGET = "Budget: at least one; all hold for the whole model"
CHOICE = "Choice"
POSITIONS = "64"


def _list_methods(wanted: bool) -> None:
    if wanted:
        from rankfold.cli._methods import listing

        with exit_codes(show_traceback=False):
            emit(listing())
        raise typer.Exit


@dataclass(frozen=True)
class Choice:
    """The options of the panel "Choice" as typed, but for the plan."""

    family: list[str] | None
    selector: str | None
    repair: str | None
    weighting: bool
    only: list[str] | None
    exclude: list[str] | None
    outputs: list[str] | None

    @property
    def given(self) -> list[str]:
        """The options that were typed."""
        words = [
            f"--{name}"
            for name in ("family", "selector", "repair", "only", "exclude", "outputs")
            if getattr(self, name)
        ]
        return words if self.weighting else [*words, "--no-weighting"]


@dataclass(frozen=True)
class Request:
    """The request of the command: either a budget with the ways to meet it, or a plan to carry out.

    Attributes:
        options: Arguments of `rankfold.compress`, but for the model, the data, the seed and the progress.
        plan: The plan, or None.
        positions: Number of positions as typed, or None.
        seed: Seed as typed, or None.
        memory: Maximum number of bytes of activations and moments, or None.
    """

    options: dict[str, Any]
    plan: Plan | None
    positions: str | None
    seed: int | None
    memory: int | None = None


@o.bounded(BUDGET)
def compress(
    model: o.Model,
    data: o.Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty directory for the checkpoint.")],
    bounds: o.Bounds = o.NO_BOUNDS,
    family: Annotated[
        list[str] | None,
        typer.Option(
            "--family",
            metavar="METHOD",
            rich_help_panel=CHOICE,
            help="A way to make layers smaller, as name, name(option=value) or JSON; again for more to choose from. "
            "See --list-methods.",
        ),
    ] = None,
    selector: Annotated[
        str | None,
        typer.Option(
            "--selector",
            metavar="METHOD",
            rich_help_panel=CHOICE,
            help="How ranks, or how many channels stay, are chosen; without it several plans are tried and the one "
            "closest to the original on held-out inputs is taken.",
        ),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            "--repair",
            metavar="METHOD",
            show_default="lockstep",
            rich_help_panel=CHOICE,
            help='How layers are solved again after the choice, or "none".',
        ),
    ] = None,
    weighting: Annotated[
        bool,
        typer.Option(
            " /--no-weighting",
            show_default=False,
            rich_help_panel=CHOICE,
            help="Take every layer's error as it is, not by what the output feels of it (saves two backward passes).",
        ),
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", rich_help_panel=CHOICE, help="Layers to compress; again for more."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", rich_help_panel=CHOICE, help="Layers to leave alone."),
    ] = None,
    outputs: o.OutputKinds = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", rich_help_panel=CHOICE, help="Carry out this plan.json, edited or not, instead."
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            metavar="N",
            show_default=f"{POSITIONS}, or the plan's",
            help='Pixels or tokens a sample to look at, or "all".',
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="DIR",
            help="Keep what is finished here; a run that was killed goes on from it, another budget reuses it.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            show_default="no limit",
            help="Most memory for activations and moments, e.g. 512MB; see the guide for what is beyond.",
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Print every layer before and after, and every plan that was tried, too."),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", min=0, show_default="0, or the plan's", help="Seed of everything that is drawn."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a rankfold checkpoint that is there.")
    ] = False,
    weights: o.Weights = None,
    factory: o.Factory = None,
    device: o.Device = "cpu",
    batch_size: o.BatchSize = None,
    limit: o.Limit = o.LIMIT,
    size: o.Size = 224,
    mean: o.Mean = o.IMAGENET_MEAN,
    std: o.Std = o.IMAGENET_STD,
    length: o.Length = 128,
    json: o.Json = False,
    traceback: o.Traceback = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods",
            callback=_list_methods,
            is_eager=True,
            rich_help_panel=CHOICE,
            help="Print every family, selector and repair with its options, and stop.",
        ),
    ] = False,
) -> None:
    """Make MODEL as small as the budget says, from unlabelled inputs DATA, without training, and write it to DIR."""
    with exit_codes(show_traceback=traceback):
        data_options = DataOptions.parse(
            batch_size=batch_size, limit=limit, size=size, mean=mean, std=std, length=length
        )
        spec = ModelSpec.parse(model, weights=weights, factory=factory)
        source = DataSpec.parse(data, data_options)
        target = check_out(out, overwrite=overwrite)
        with process_group(device) as first, progress_bar(wanted=first) as progress, stdout_kept_clean():
            choice = Choice(family, selector, repair, weighting, only, exclude, outputs)
            request = _parse(bounds, choice, plan, positions, seed, work_dir, memory)
            done = _run(spec, source, data_options, request, device=device, progress=progress)
            from rankfold.store.checkpoint import save

            if first:
                save(done, target, overwrite=overwrite)
        if not first:
            return
        if json:
            emit_json(_as_json(done, spec, target))
        else:
            table = f"{done.report.table(width=width())}\n" if layers else ""
            emit(f"{table}{done.report.text()}saved to {out}")


def _parse(
    bounds: Mapping[str, str | None],
    choice: Choice,
    plan: Path | None,
    positions: str | None,
    seed: int | None,
    work_dir: Path | None,
    memory: str | None,
) -> Request:
    from rankfold.allocation import Selector
    from rankfold.decompositions import Family
    from rankfold.repair import Lockstep

    if positions is not None:
        parse_positions(positions)
    limit = parse_limit(memory)
    if plan is not None:
        beside = [f"--{name}" for name, value in bounds.items() if value] + choice.given
        beside += ["--work-dir"] if work_dir is not None else []
        if beside:
            raise UsageError(
                f"--plan {plan}",
                law="the plan sets what these options set",
                got=", ".join(beside),
                cure="leave them out",
            )
        return Request({}, _read_plan(plan), positions, seed, limit)
    options: dict[str, Any] = {
        "budget": parse_budget(bounds),
        "weighting": choice.weighting,
        "outputs": parse_outputs(choice.outputs),
        "exclude": choice.exclude or (),
        "only": choice.only or None,
        "work_dir": work_dir,
    }
    if choice.family:
        options["families"] = [parse_method(text, Family, option="--family") for text in choice.family]
    if choice.selector is not None:
        options["selector"] = parse_method(choice.selector, Selector, option="--selector")
    if choice.repair is not None:
        none = choice.repair == "none"
        options["repair"] = None if none else parse_method(choice.repair, Lockstep, option="--repair")
    return Request(options, None, positions, seed, limit)


def _read_plan(path: Path) -> Plan:
    from rankfold.plan import Plan

    if not path.is_file():
        raise UsageError(f"--plan {path}", law="a plan.json", got="no such file", cure="check the path")
    return Plan.load(path)


def _run(
    spec: ModelSpec, source: DataSpec, options: DataOptions, request: Request, *, device: str, progress: Progress
) -> Compressed:
    place = o.parse_device(device)
    with progress("load", None):
        network = spec.load(seed=request.seed or 0, device=place)
    batches = source.open(
        options,
        tokenizer=spec.directory,
        dtype=o.weight_dtype(network),
        labels=False,
        causal=False,
        names=o.forward_names(network),
    )
    done = _compressed(network, batches, request, totalled(progress, {"statistics": expected(batches)}))
    return replace(done, report=replace(done.report, notes=(*done.report.notes, *spec.notes, *notes_of(batches))))


def _compressed(network: nn.Module, batches: Iterable[Any], request: Request, progress: Progress) -> Compressed:
    from rankfold.api import compress as compress_model
    from rankfold.api import execute

    if request.plan is not None:
        plan = request.plan if request.seed is None else replace(request.plan, seed=request.seed)
        if request.positions is not None:
            plan = replace(plan, calibration={**plan.calibration, "positions": parse_positions(request.positions)})
        return execute(network, batches, plan, memory=request.memory, progress=progress)
    try:
        done: Compressed = compress_model(
            network,
            batches,
            positions=parse_positions(request.positions or POSITIONS),
            seed=request.seed or 0,
            memory=request.memory,
            progress=progress,
            **request.options,
        )
        return done
    except SiteError as cause:
        raise UsageError.of(f"--only or --exclude {cause.place}", cause) from cause


def _as_json(done: Compressed, spec: ModelSpec, target: Path) -> dict[str, Any]:
    from rankfold.serialization import parse_json

    return {
        "version": 1,
        "model": spec.text,
        "weights": spec.origin,
        "out": str(target),
        "plan": parse_json(done.plan.to_json(), place="plan"),
        "report": parse_json(done.report.to_json(), place="report"),
    }

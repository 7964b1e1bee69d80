"""`rankfold inspect`: which layers can be compressed, which cannot and why, and what the model costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli import _options as o
from rankfold.cli._data import DataSpec
from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import UsageError, exit_codes
from rankfold.cli._models import ModelSpec
from rankfold.cli._names import parse_budget, parse_limit, parse_numbers
from rankfold.cli._output import emit, emit_json, stdout_kept_clean, width
from rankfold.progress import progress_bar
from rankfold.serialization import parse_json

if TYPE_CHECKING:
    from rankfold.allocation import Budget
    from rankfold.channels.groups import Channels
    from rankfold.forecasting.forecast import Forecast
    from rankfold.sites.site import Sites


BUDGET = "Budget: predict what compress would take, and what it can reach"


@o.bounded(BUDGET)
def inspect(
    model: o.Model,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help=f"{o.DATA_HELP} One batch is read.")] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="C,H,W", help="Instead of DATA: shape of one sample of random numbers."),
    ] = None,
    weights: o.Weights = None,
    factory: o.Factory = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    batch_size: o.BatchSize = None,
    size: o.Size = 224,
    mean: o.Mean = o.IMAGENET_MEAN,
    std: o.Std = o.IMAGENET_STD,
    length: o.Length = 128,
    bounds: o.Bounds = o.NO_BOUNDS,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", rich_help_panel=BUDGET, help="The limit of compress, e.g. 512MB."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=1, rich_help_panel=BUDGET, help="Most samples, as for compress."),
    ] = o.LIMIT,
    channels: Annotated[
        bool, typer.Option("--channels", help="Also list the groups of channels that can be removed together.")
    ] = False,
    json: o.Json = False,
    traceback: o.Traceback = False,
) -> None:
    """List the layers of MODEL that can be compressed, those that cannot with the reason, and the model's cost.

    The model runs once on one batch, since cost depends on the size of the input. With a budget, what compress would
    take is predicted too, and what it can reach.
    """
    with exit_codes(show_traceback=traceback):
        budget = parse_budget(bounds) if any(bounds.values()) else None
        room = parse_limit(memory)
        options = DataOptions.parse(
            batch_size=batch_size,
            limit=None if budget is None else limit,
            size=size,
            mean=mean,
            std=std,
            length=length,
        )
        spec = ModelSpec.parse(model, weights=weights, factory=factory)
        if (data is None) == (shape is None):
            raise UsageError(
                "inspect",
                law="one of DATA and --shape gives the input",
                got="neither" if data is None else "both",
                cure="for example --shape 3,224,224",
            )
        if budget is not None and data is None:
            raise UsageError(
                "inspect",
                law="a budget needs DATA: how long compress takes depends on its samples",
                got="--shape",
                cure="pass the DATA that compress will get",
            )
        source = None if data is None else DataSpec.parse(data, options)
        sample = None if shape is None else parse_numbers(shape, int, option="--shape")
        with progress_bar() as progress, stdout_kept_clean(), progress("trace", None):
            sites, groups, forecast = _find(
                spec, source, sample, options, channels=channels, device=device, seed=seed, budget=budget, memory=room
            )
        if json:
            found = _as_json(sites) if groups is None else {**_as_json(sites), **_groups_as_json(groups)}
            if forecast is not None:
                found["forecast"] = parse_json(forecast.to_json(), place="forecast")
            emit_json({"model": model, "weights": spec.origin, "notes": list(spec.notes), **found})
        else:
            from rankfold.report.table import render_channels, render_sites

            text = render_sites(sites, width=width())
            if groups is not None:
                text += "\n" + render_channels(groups, width=width())
            if forecast is not None:
                text += "\n" + forecast.text()
            emit(text + "".join(f"note: {note}\n" for note in spec.notes))


def _find(
    spec: ModelSpec,
    source: DataSpec | None,
    sample: tuple[int, ...] | None,
    options: DataOptions,
    *,
    channels: bool,
    device: str,
    seed: int,
    budget: Budget | None,
    memory: int | None,
) -> tuple[Sites, Channels | None, Forecast | None]:
    import torch

    from rankfold.api import compress
    from rankfold.channels.groups import find_channels
    from rankfold.data.splits import as_batches
    from rankfold.sites.finding import find_sites

    network = spec.load(seed=seed, device=o.parse_device(device))
    dtype = o.weight_dtype(network)
    batches: Any = None
    if source is None:
        generator = torch.Generator().manual_seed(seed)
        example: Any = torch.randn(1, *(sample or ()), generator=generator).to(dtype)
    else:
        batches = source.open(
            options,
            tokenizer=spec.directory,
            dtype=dtype,
            labels=False,
            causal=False,
            names=o.forward_names(network),
        )
        example = next(iter(as_batches(batches)))
    sites = find_sites(network, example)
    groups = find_channels(network, sites) if channels else None
    forecast = None
    if budget is not None:
        forecast = compress(network, batches, budget=budget, memory=memory, seed=seed, dry_run=True)
    return sites, groups, forecast


def _groups_as_json(channels: Channels) -> dict[str, Any]:
    return {
        "channels": [
            {"group": group.name, "units": group.units, "made": list(group.made), "read": list(group.read)}
            for group in channels
        ],
        "frozen": [{"path": skip.path, "reason": skip.reason} for skip in channels.skips],
    }


def _as_json(sites: Sites) -> dict[str, Any]:
    return {
        "version": 1,
        "class": sites.model,
        "sites": [
            {
                "path": site.path,
                "aliases": list(site.aliases),
                "kind": site.kind,
                "weight_shape": list(site.weight_shape),
                "groups": site.geometry.groups,
                "params": site.geometry.n_params,
                "macs": site.macs,
            }
            for site in sites
        ],
        "skips": [{"path": skip.path, "reason": skip.reason} for skip in sites.skips],
        "split": list(sites.split),
        "cost": sites.cost.amounts(),
        "no_graph": sites.graph.reason,
    }

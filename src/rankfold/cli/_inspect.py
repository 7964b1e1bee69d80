"""`rankfold inspect`: which layers can be compressed, which cannot and why, and what the model costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankfold.cli import _options as o
from rankfold.cli._data import DataOptions, DataSpec
from rankfold.cli._errors import UsageError, exit_codes
from rankfold.cli._models import ModelSpec
from rankfold.cli._names import parse_numbers
from rankfold.cli._output import emit, emit_json, stdout_kept_clean, width
from rankfold.progress import progress_bar

if TYPE_CHECKING:
    from rankfold.graph.channels import Channels
    from rankfold.graph.sites import Sites


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
    channels: Annotated[
        bool, typer.Option("--channels", help="Also list the groups of channels that can be removed together.")
    ] = False,
    json: o.Json = False,
    traceback: o.Traceback = False,
) -> None:
    """List the layers of MODEL that can be compressed, those that cannot with the reason, and the model's cost.

    The model runs once on one batch, since cost depends on the size of the input.
    """
    with exit_codes(show_traceback=traceback):
        options = DataOptions.parse(batch_size=batch_size, limit=None, size=size, mean=mean, std=std, length=length)
        spec = ModelSpec.parse(model, weights=weights, factory=factory)
        if (data is None) == (shape is None):
            raise UsageError(
                "inspect",
                law="one of DATA and --shape gives the input",
                got="neither" if data is None else "both",
                cure="for example --shape 3,224,224",
            )
        source = None if data is None else DataSpec.parse(data, options)
        sample = None if shape is None else parse_numbers(shape, int, option="--shape")
        with progress_bar() as progress, stdout_kept_clean(), progress("trace", None):
            sites, groups = _find(spec, source, sample, options, channels=channels, device=device, seed=seed)
        if json:
            found = _as_json(sites) if groups is None else {**_as_json(sites), **_groups_as_json(groups)}
            emit_json({"model": model, "weights": spec.origin, "notes": list(spec.notes), **found})
        else:
            from rankfold.report.text import render_channels, render_sites

            text = render_sites(sites, width=width())
            if groups is not None:
                text += "\n" + render_channels(groups, width=width())
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
) -> tuple[Sites, Channels | None]:
    import torch

    from rankfold.graph.channels import find_channels
    from rankfold.graph.sites import find_sites
    from rankfold.statistics.data import as_batches

    network = spec.load(seed=seed, device=o.parse_device(device))
    dtype = o.weight_dtype(network)
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
    return sites, find_channels(network, sites) if channels else None


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
        "cost": sites.cost.amounts(),
        "no_graph": sites.graph.reason,
    }

"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from rankfold.cli._errors import UsageError
from rankfold.cost.resources import RESOURCES

if TYPE_CHECKING:
    import torch
    from torch import nn

LIMIT = 1024  # samples that calibration looks at by default
MODEL_HELP = (
    "package.module:factory (the current directory can be imported), path/to/file.py:factory, a local Hugging Face "
    "directory, timm:NAME or torchvision:NAME (random weights unless --weights is given; nothing is downloaded), or a "
    "rankfold checkpoint (with --factory)."
)
DATA_HELP = (
    "package.module:factory or path/to/file.py:factory that returns re-iterable batches, a folder of images, a .npz "
    "(one array of inputs, or arrays named like the model's keyword arguments; optional labels, also as label, target "
    "or y), a .npy of inputs, or a text file."
)

Model: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Data: TypeAlias = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]

Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="Trained weights, a safetensors file, for a factory, timm or torchvision."
    ),
]
Factory: TypeAlias = Annotated[
    str | None,
    typer.Option("--factory", metavar="MODEL", help="Builds the original architecture of a rankfold checkpoint."),
]
Device: TypeAlias = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1.")
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything that is drawn.")]
OutputKinds: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs",
        metavar="KIND",
        show_default="guessed",
        help="What the outputs are: logits, values or embedding, with options as in logits(axis=1); of several outputs "
        "NAME=KIND each, or NAME=none to leave one out.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Traceback: TypeAlias = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]

PANEL = "Data"
BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="N", min=1, show_default="32", rich_help_panel=PANEL, help="Samples a batch, for files."
    ),
]
Limit: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        min=1,
        rich_help_panel=PANEL,
        help="Most samples: evenly spaced ones of a folder or .npz, the first ones of a text or factory.",
    ),
]
Size: TypeAlias = Annotated[
    int,
    typer.Option(
        "--size", metavar="N", min=1, rich_help_panel=PANEL, help="Side of the square that images are brought to."
    ),
]
Mean: TypeAlias = Annotated[
    str,
    typer.Option(
        "--mean",
        metavar="N,N,N",
        rich_help_panel=PANEL,
        help="Mean of each channel of an image scaled to 0 … 1; one is grey.",
    ),
]
Std: TypeAlias = Annotated[
    str, typer.Option("--std", metavar="N,N,N", rich_help_panel=PANEL, help="Standard deviation of each channel.")
]
Length: TypeAlias = Annotated[
    int, typer.Option("--length", metavar="N", min=1, rich_help_panel=PANEL, help="Tokens a block of a text.")
]
IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


Bounds: TypeAlias = Mapping[str, str | None]
NO_BOUNDS: Bounds = {}


def bounded(panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every resource that a budget can bound, such as --params; it gets them as `bounds`.

    Args:
        panel: Title in the help under which these options stand.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = {name: f"bound_{name}" for name in RESOURCES}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name != "bounds":
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
                continue
            for number, (name, what) in enumerate(RESOURCES.items()):
                text = f"{what}{', likewise' if number else ': kept fraction, or a whole number'}."
                option = typer.Option(f"--{name}", metavar="N", rich_help_panel=panel, help=text)
                kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
                hint = Annotated[str | None, option]
                parameters.append(inspect.Parameter(own[name], kind, default=None, annotation=hint))

        @functools.wraps(command)
        def given(**arguments: Any) -> None:
            bounds = {name: arguments.pop(word) for name, word in own.items()}
            command(**arguments, bounds=bounds)

        given.__annotations__ = {each.name: each.annotation for each in parameters}
        given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return given

    return decorate


def parse_device(text: str) -> torch.device:
    """A device of this machine.

    Raises:
        UsageError: The text names no device, or none of this machine.
    """
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise UsageError(
            f"--device {text}", law="a device of this machine", got=str(cause).splitlines()[0], cure="try --device cpu"
        ) from cause
    if device.type == "meta":
        raise UsageError("--device meta", law="a device that holds numbers", got="meta", cure="try --device cpu")
    return device


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating parameter; float32 for a model without any."""
    import torch

    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def forward_names(model: nn.Module) -> tuple[str, ...] | None:
    """The arguments that a model's forward takes by name; None where it takes any."""
    from inspect import Parameter, signature

    parameters = signature(model.forward).parameters.values()
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        return None
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return tuple(each.name for each in parameters if each.kind in named)


def is_causal(model: nn.Module) -> bool:
    """Whether a model is a causal language model of transformers, whose tokens are their own labels."""
    import sys

    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    return auto is not None and type(model).__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

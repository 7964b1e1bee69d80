"""A compressed model as an ordinary Hugging Face directory, which `from_pretrained` loads without rankfold."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rankfold.channels.stock import configured, entries_of, is_stock
from rankfold.errors import ModelError, PlanError, WriteError
from rankfold.layers.splitting import joined
from rankfold.outputs.taken import opened
from rankfold.plan import Plan
from rankfold.serialization import write_directory
from rankfold.sites.copies import copied
from rankfold.store.checkpoint import check_compressed, check_path

if TYPE_CHECKING:
    from rankfold.report.compressed import Compressed


def save_pretrained(out: Compressed, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a transformers model that lost channels as its own library writes models.

    The entries of the configuration that set the new sizes (`intermediate_size`, numbers of heads) are found by trying:
    an entry changes where more tensors of a model built from the new configuration then have the compressed model's
    shapes, and nothing is written unless all of them agree and both models compute the same. The sizes that
    `Interpolative(uniform=True)` leaves can be set in a configuration. Where layers differ in width, the entries are
    written layer by layer (`per_layer_config`), if the model's class in the installed transformers reads them so.

    Args:
        out: Result of `compress` for a model of transformers.
        path: A new or empty directory.
        overwrite: True to replace what such a call wrote before; a directory that holds any other file stays.

    Raises:
        OptionError: `out` is not what `compress` returned, or `path` is no path.
        ModelError: The model is not one of transformers.
        PlanError: The plan factorises layers, or no configuration of the model's class sets its sizes.
        WriteError: The directory is taken or cannot be written; nothing half-written is left.
    """
    check_compressed(out)
    check_path(path)
    model: Any = joined(out.model)
    if not is_stock(model):
        raise ModelError(
            type(model).__name__,
            law="a model of transformers",
            got=f"a {type(model).__module__}.{type(model).__qualname__}",
            cure="use rankfold.save",
        )
    if out.plan.changes:
        raise PlanError(
            "plan",
            law="channels are removed and no layer is factorised, so that the architecture stays the stock one",
            got=f"{out.plan.changes[0].site} as {out.plan.changes[0].form}",
            cure="compress with families=[rankfold.Interpolative(uniform=True)], or use rankfold.save",
        )
    stock = _stock(model, out.plan)
    target = Path(path)
    values = stock.state_dict()
    try:
        with tempfile.TemporaryDirectory(prefix=".rankfold-", dir=_existing(target)) as folder:
            stock.save_pretrained(folder, state_dict={name: values[name] for name in model.state_dict()})
            files = sorted(file for file in Path(folder).iterdir() if file.is_file())
            write_directory(target, {file.name: _moving(file) for file in files}, overwrite=overwrite)
    except (OSError, SafetensorError) as cause:
        if isinstance(cause, WriteError):
            raise
        raise WriteError(
            str(target),
            law="the output directory can be written",
            got=str(cause),
            cure="check the permissions and the free space; nothing was left behind",
        ) from cause


def _moving(source: Path) -> Callable[[Path], None]:
    def move(file: Path) -> None:
        shutil.move(source, file)

    return move


def _existing(path: Path) -> Path:
    """The nearest folder that is there already, so that files are moved within one disk."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _stock(model: Any, plan: Plan) -> Any:
    """A model of the same class, built from a configuration with its sizes, with the compressed weights.

    Raises:
        PlanError: There is no such configuration, or its model computes something else.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    kept = {decision.group: (decision.units, len(decision.kept)) for decision in plan.channels}
    entries = entries_of(model, wanted, kept)
    if not isinstance(entries, dict):
        name, shape = entries
        raise PlanError(
            name,
            law=f"a configuration of {type(model).__name__} says the sizes of every tensor",
            got=f"shape {wanted.get(name)} where it has {shape}",
            cure="compress with families=[rankfold.Interpolative(uniform=True)], or use rankfold.save",
        )
    built = type(model)(configured(model.config, entries)).to(model.dtype).eval()
    built.load_state_dict(model.state_dict(), strict=False)  # the shapes agree, as was just found
    built.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    if inputs := _example(model):
        with torch.no_grad():
            expected = opened(copied(model).cpu().eval()(**inputs)).counted()
            found = opened(built(**inputs)).counted()
        for name, theirs in expected.items():
            got = found[name]
            if torch.allclose(got, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
                continue
            raise PlanError(
                "plan",
                law="a model built from the new configuration computes what the compressed model computes",
                got=f"outputs that differ by {float((got - theirs).abs().max()):.3g}",
                cure="use rankfold.save; please report it",
            )
    return built


def _example(model: Any) -> dict[str, torch.Tensor]:
    """Arguments to compare two models on: token ids for a language model, an image for one that reads pixels."""
    config, name = model.config, getattr(model, "main_input_name", "")
    if name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        return {name: torch.arange(1, 9)[None] % max(2, getattr(config, "vocab_size", 2))}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {name: torch.rand(shape, generator=torch.Generator().manual_seed(0))}
    return {}

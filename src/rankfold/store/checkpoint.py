"""A compressed model on disk: plan, weights, report and their checksums. Never a pickle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from rankfold.errors import CheckpointError, ModelError, OptionError, PlanError, RankfoldError, WriteError, shown
from rankfold.install.checks import check_plan, split_by
from rankfold.install.fill import install_shells
from rankfold.plan import Plan
from rankfold.serialization import canonical_json, check_json_size, read_json, sha256_file, write_directory, write_text
from rankfold.sites.finding import fingerprint

if TYPE_CHECKING:
    from rankfold.report.compressed import Compressed

VERSION = 1
FILES = ("plan.json", "model.safetensors", "report.json")
CHECKSUMS = "checksums.json"


def save(out: Compressed, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint directory, whole or not at all.

    `plan.json`, `model.safetensors` (all weights and persistent buffers, shared ones once), `report.json`, and
    `checksums.json` with the SHA-256 of each.

    Args:
        out: Result of `compress`.
        path: A new or empty directory.
        overwrite: True to replace a checkpoint that is there; a directory that holds any other file stays.

    Raises:
        OptionError: `out` is not what `compress` returned, or `path` is no path.
        WriteError: The directory is taken or cannot be written; nothing half-written is left.
    """
    check_compressed(out)
    check_path(path)
    sums: dict[str, str] = {}

    def noting(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
        def both(file: Path) -> None:
            write(file)
            sums[name] = sha256_file(file)

        return both

    def write_model(file: Path) -> None:
        try:
            save_model(out.model, str(file))
        except SafetensorError as cause:
            raise WriteError(
                str(path), law="the weights can be written", got=str(cause), cure="check the free space"
            ) from cause

    writers = {
        "plan.json": write_text(out.plan.to_json()),
        "model.safetensors": write_model,
        "report.json": write_text(out.report.to_json()),
    }
    noted: dict[str, Callable[[Path], None]] = {name: noting(name, write) for name, write in writers.items()}

    def write_sums(file: Path) -> None:
        write_text(canonical_json({"version": VERSION, "sha256": sums}))(file)

    write_directory(Path(path), {**noted, CHECKSUMS: write_sums}, overwrite=overwrite)


def load(path: str | Path, *, factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a compressed model from a checkpoint: the user's skeleton, shells in place, weights from the file.

    Args:
        path: A directory that `save` wrote.
        factory: Function that builds the *original* architecture on a real device; its weights are overwritten, and its
            attention is split as that of the original was.

    Returns:
        A plain module in eval mode, with the bits that were saved.

    Raises:
        OptionError: `path` is no path, or `factory` no function.
        CheckpointError: A file is missing, truncated or altered, the weights do not fit the structure, or the factory
            returns no module.
        ModelError: The factory fails, or builds a model with tensors on meta.
        PlanError: The factory builds another architecture than the plan's; the first tensor that differs is named
            where that is known.
    """
    if not callable(factory) or isinstance(factory, nn.Module):
        raise OptionError(
            "factory",
            law="a function without arguments",
            got=f"a {type(factory).__name__}" if isinstance(factory, nn.Module) else shown(factory),
            cure="pass a function that builds the original architecture",
        )
    folder = verify(path)
    plan = Plan.load(folder / "plan.json")
    try:
        model = factory()
    except RankfoldError:
        raise
    except Exception as cause:
        raise ModelError(
            "factory",
            law="the factory builds the original architecture",
            got=f"{type(cause).__name__}: {str(cause)[:300]}",
            cure="call it alone: it takes no arguments and must return the model",
        ) from cause
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            str(folder),
            law="the factory returns an nn.Module",
            got=type(model).__name__,
            cure="pass a function that builds the original architecture",
        )
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise ModelError(
                name,
                law="the factory builds the architecture on a real device",
                got="a tensor on meta",
                cure="build it outside torch.device('meta'); its weights are overwritten",
            )
    model = split_by(model, plan, inplace=True)
    try:
        check_plan(model, plan)
    except PlanError as cause:
        difference = _difference(model, plan, folder / "model.safetensors")
        if plan.fingerprint == fingerprint(model) or difference is None:
            raise
        raise PlanError(cause.place, law=cause.law, got=f"{cause.got}: {difference}", cure=cause.cure) from cause
    model = install_shells(model, plan)
    try:
        _load_weights(model, folder / "model.safetensors")
    except (RuntimeError, SafetensorError) as cause:
        raise CheckpointError(
            str(folder / "model.safetensors"),
            law="the weights fit the structure of the plan",
            got=str(cause)[:300],
            cure="load with the factory and the release that the checkpoint was written with",
        ) from cause
    return model.eval()


def _load_weights(model: nn.Module, file: Path) -> None:
    """All tensors of a file into a model; one that has several names in the model is in the file once."""
    state = load_file(str(file))
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    places = {_place(value): name for name, value in own.items() if name in state}
    for name, value in own.items():
        other = places.get(_place(value))
        if name not in state and other is not None and value.numel():
            state[name] = state[other]
    model.load_state_dict(state, strict=True)


def _place(value: Tensor) -> tuple[object, ...]:
    """Key that two names of one tensor have in common."""
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _difference(model: nn.Module, plan: Plan, weights: Path) -> str | None:
    """The first tensor outside the decided layers that has another shape or dtype in the file than in a model."""
    decided = tuple(f"{decision.site}." for decision in plan.changes)
    try:
        with safe_open(str(weights), framework="pt") as file:
            saved = set(file.keys())
            for name, here in model.state_dict().items():
                if name not in saved or name.startswith(decided) or not isinstance(here, Tensor):
                    continue
                there = file.get_tensor(name)
                if (there.shape, there.dtype) != (here.shape, here.dtype):
                    was, given = (f"{value.dtype} of shape {tuple(value.shape)}" for value in (there, here))
                    return f"{name} is {was} in the checkpoint, {given} here"
    except (OSError, SafetensorError):
        return None
    return None


def check_compressed(out: object) -> None:
    """Refuse what `compress` and `execute` did not return."""
    from rankfold.report.compressed import Compressed

    if not isinstance(out, Compressed):
        raise OptionError(
            "out",
            law="what rankfold.compress or rankfold.execute returned",
            got=f"a {type(out).__name__}",
            cure="pass what compress returned, not its model alone",
        )


def check_path(path: str | Path) -> None:
    """Refuse what is no path.

    Raises:
        OptionError: `path` is neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError("path", law="the path of a directory", got=shown(path), cure="pass a str or a Path")


def verify(path: str | Path) -> Path:
    """Check that a checkpoint is complete and that every file has the checksum noted when it was written.

    Returns:
        The directory.

    Raises:
        OptionError: `path` is no path.
        CheckpointError: A file is missing, truncated or altered.
    """
    check_path(path)
    folder = Path(path)
    try:
        got = None if folder.is_dir() else "a file" if folder.exists() else "nothing there"
    except OSError as cause:  # a name too long
        got = str(cause)
    if got is not None:
        raise CheckpointError(
            str(folder),
            law="a checkpoint is a directory",
            got=got,
            cure="pass the directory that rankfold.save wrote",
        )
    for name in (*FILES, CHECKSUMS):
        if not (folder / name).is_file():
            raise CheckpointError(
                str(folder / name),
                law=f"a checkpoint holds {', '.join((*FILES, CHECKSUMS))}",
                got="no such file",
                cure="copy the whole directory again",
            )
    for name in FILES:
        if name.endswith(".json"):
            check_json_size(folder / name)
    head: Any = read_json(folder / CHECKSUMS)
    if not isinstance(head, dict) or head.get("version") != VERSION or not isinstance(head.get("sha256"), dict):
        raise CheckpointError(
            str(folder / CHECKSUMS),
            law=f"checksums of version {VERSION}",
            got=repr(head)[:60],
            cure="load it with the release that wrote it",
        )
    for name in FILES:
        if sha256_file(folder / name) != head["sha256"].get(name):
            raise CheckpointError(
                str(folder / name),
                law="the file has the checksum noted when it was saved",
                got="other bytes: truncated or altered",
                cure="copy the whole directory again",
            )
    return folder

"""A compressed model on disk: plan, weights, report and their checksums. Never a pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from rankfold.errors import CheckpointError, WriteError
from rankfold.plan import Plan
from rankfold.serialization import (
    canonical_json,
    check_json_size,
    read_json,
    sha256_file,
    write_directory,
    write_text,
)
from rankfold.surgery import check_plan, install_shells

if TYPE_CHECKING:
    from rankfold.pipeline import Compressed

VERSION = 1
FILES = ("plan.json", "model.safetensors", "report.json")
CHECKSUMS = "checksums.json"


def save(out: Compressed, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint directory, whole or not at all.

    `plan.json`, `model.safetensors` (all weights and persistent buffers, shared ones once), `report.json`, and
    `checksums.json` with the SHA-256 of each.

    Args:
        out: From `compress`.
        path: A new or empty directory.
        overwrite: Replace a checkpoint that is there; a directory that holds any other file stays.

    Raises:
        WriteError: The directory is taken or cannot be written; nothing half-written is left.
    """
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
        factory: Builds the *original* architecture on a real device; its weights are overwritten.

    Returns:
        A plain module in eval mode, with the bits that were saved.

    Raises:
        CheckpointError: A file is missing, truncated or altered, or the weights do not fit the structure.
        PlanError: The factory builds another architecture than the plan's.
    """
    folder = verify(path)
    plan = Plan.load(folder / "plan.json")
    model = factory()
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            str(folder),
            law="the factory returns an nn.Module",
            got=type(model).__name__,
            cure="pass a function that builds the original architecture",
        )
    check_plan(model, plan)
    model = install_shells(model, plan)
    try:
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except (RuntimeError, SafetensorError) as cause:
        raise CheckpointError(
            str(folder / "model.safetensors"),
            law="the weights fit the structure of the plan",
            got=str(cause)[:300],
            cure="load with the factory and the release that the checkpoint was written with",
        ) from cause
    return model.eval()


def verify(path: str | Path) -> Path:
    """Check that a checkpoint is complete and that every file has the checksum noted when it was written.

    Returns:
        The directory.

    Raises:
        CheckpointError: A file is missing, truncated or altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            str(folder),
            law="a checkpoint is a directory",
            got="a file" if folder.exists() else "nothing there",
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

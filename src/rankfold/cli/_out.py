"""The output directory, checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from rankfold.errors import WriteError


def check_out(path: Path, *, overwrite: bool | None) -> Path:
    """Check that a checkpoint can be written at a path, before minutes of work depend on it.

    `--overwrite` replaces a checkpoint of rankfold and nothing else: a directory that holds any other file stays.

    Args:
        path: Path of the checkpoint.
        overwrite: True if a checkpoint there may be replaced; None for a command that never replaces one.

    Returns:
        The absolute path, links followed.

    Raises:
        WriteError: The directory is taken, or cannot be written.
    """
    target = path.resolve()
    try:
        target.exists()
    except OSError as cause:  # a name too long
        raise WriteError(
            str(path), law="the output directory can be written", got=str(cause), cure="choose another --out"
        ) from cause
    if target.exists() and not target.is_dir():
        raise WriteError(str(path), law="the output is a directory", got="a file", cure="choose another --out")
    held = sorted(file.name for file in target.iterdir()) if target.is_dir() else []
    if held and not overwrite:
        raise WriteError(
            str(path),
            law="the output is a new or empty directory",
            got=f"one that holds {held[0]!r}",
            cure="choose another --out" + ("" if overwrite is None else ", or add --overwrite to replace a checkpoint"),
        )
    if held:
        from rankfold.store.checkpoint import CHECKSUMS, FILES

        foreign = [name for name in held if name not in {*FILES, CHECKSUMS}]
        if foreign or CHECKSUMS not in held:
            raise WriteError(
                str(path),
                law="--overwrite replaces a rankfold checkpoint and nothing else",
                got=f"a directory that holds {foreign[0]!r}" if foreign else f"a directory without {CHECKSUMS}",
                cure="choose another --out",
            )
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(
            str(path),
            law="the output directory can be written",
            got=f"{parent} is {'read-only' if parent.is_dir() else 'a file'}",
            cure="choose another --out, or change the permissions",
        )
    return target

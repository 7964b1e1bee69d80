"""The output on stdout: a text or JSON, and nothing else."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import typer

from rankfold.cli._errors import CLOSED
from rankfold.errors import WriteError

PIPE_WIDTH = 110


def width() -> int:
    """Columns to lay a table out in: the terminal's, or a fixed number in a pipe."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else PIPE_WIDTH


def emit(text: str) -> None:
    """Write to stdout now, so that a closed pipe or a full disk is noticed here and not at the interpreter's end.

    Raises:
        WriteError: The text cannot be written.
        typer.Exit: The reader has closed the pipe (`| head`): the command ends as by SIGPIPE, without a message.
    """
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError as cause:
        drop_stdout()
        raise typer.Exit(CLOSED) from cause
    except OSError as cause:
        raise unwritable(cause) from cause


def unwritable(cause: OSError) -> WriteError:
    """The error for a stdout that cannot be written; the text that it still holds is dropped."""
    drop_stdout()
    return WriteError(
        "standard output",
        law="the result can be written",
        got=str(cause),
        cure="check the free space; a checkpoint that was made is in its directory",
    )


def drop_stdout() -> None:
    """Discard the text that stdout still holds, since the interpreter would fail on it once more at its end."""
    with suppress(OSError):  # a stdout that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)


def emit_json(value: object) -> None:
    """Write one JSON value. Numbers that are not finite become null, since JSON has none."""
    from rankfold.serialization import canonical_json

    emit(canonical_json(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Redirect to stderr what other code prints while work is done: stdout is for the result alone."""
    with redirect_stdout(sys.stderr):
        yield

"""Errors of the command line, and the exit code of each."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from rankfold.errors import RankfoldError

FAILED, BAD_USAGE, STOPPED = 1, 2, 130
CLOSED = 141  # the code of a shell: 128 + SIGPIPE


class UsageError(RankfoldError, ValueError):
    """A word on the command line that means nothing: a bad spec, option value or name."""

    @classmethod
    def of(cls, option: str, cause: RankfoldError, *, cure: str | None = None) -> UsageError:
        """An error of the library, attributed to the option that caused it.

        Args:
            option: The option as it was typed.
            cause: The library's error.
            cure: Cure in the words of the command line, where the library's is about Python; None keeps the library's.
        """
        return cls(option, law=cause.law, got=cause.got, cure=cause.cure if cure is None else cure)


class LoadError(RankfoldError, RuntimeError):
    """A model or data that is named rightly and cannot be loaded."""


@contextmanager
def exit_codes(*, show_traceback: bool) -> Iterator[None]:
    """Turn errors that the library raises on purpose into one line on stderr and an exit code.

    `UsageError` gives 2, every other `RankfoldError` 1, Ctrl-C 130. Anything else is a defect and goes through with
    its traceback.

    Args:
        show_traceback: True to print the traceback of an error too.
    """
    try:
        yield
    except RankfoldError as cause:
        if show_traceback:
            traceback.print_exc(file=sys.stderr)
        typer.echo(f"error: {cause}", err=True)
        raise typer.Exit(BAD_USAGE if isinstance(cause, UsageError) else FAILED) from cause
    except KeyboardInterrupt as cause:
        typer.echo("stopped by Ctrl-C; nothing half-written is left", err=True)
        raise typer.Exit(STOPPED) from cause


def first_line(cause: BaseException) -> str:
    """Class and first line of a foreign error, for the "got" of a message; of the first one, where it has a cause."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__

"""`rankfold demo`: the whole road on a small trained network and real handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli import _options as o
from rankfold.cli._errors import FAILED, exit_codes
from rankfold.cli._out import check_out
from rankfold.cli._output import emit, stdout_kept_clean
from rankfold.progress import progress_bar


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep the compressed network here (a new directory).")
    ] = None,
    json: o.Json = False,
    traceback: o.Traceback = False,
) -> None:
    """Compress a small trained network to less than half its MACs, compare it on held-out digits, save and load it."""
    with exit_codes(show_traceback=traceback):
        with progress_bar() as progress, stdout_kept_clean():
            from rankfold.digits.demo import run

            result = run(None if out is None else check_out(out, overwrite=None), progress=progress)
        emit(result.to_json() if json else result.text)
        if not result.ok:
            raise typer.Exit(FAILED)

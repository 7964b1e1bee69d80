"""The commands under one name. Nothing here, nor in a command's own file, imports torch before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfold._version import __version__
from rankfold.cli._compare import compare
from rankfold.cli._compress import compress
from rankfold.cli._demo import demo
from rankfold.cli._errors import exit_codes
from rankfold.cli._export import export
from rankfold.cli._inspect import inspect
from rankfold.cli._output import emit

app = typer.Typer(
    name="rankfold",
    help="Make a trained PyTorch network smaller and faster under one budget, without retraining it.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C, 141 the reader of the output is gone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for command in (inspect, compress, compare, export, demo):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        with exit_codes(show_traceback=False):
            emit(f"rankfold {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Make a trained PyTorch network smaller and faster under one budget, without retraining it."""

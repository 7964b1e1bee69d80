"""The command line. One private file a command: parse → public function → render."""

from __future__ import annotations


def main() -> None:
    """Entry point of `rankfold` and `python -m rankfold`."""
    import sys

    try:
        from rankfold.cli._app import app

        app()
    except KeyboardInterrupt:  # outside a command: while the command line itself is being imported
        sys.exit(130)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # outside a command: the help, whose reader has read enough
            from rankfold.cli._errors import CLOSED
            from rankfold.cli._output import drop_stdout

            drop_stdout()
            stop.code = CLOSED
        raise
    except OSError as cause:  # outside a command: the help, which typer prints, cannot be written
        if cause.filename is not None:
            raise
        from rankfold.cli._output import unwritable

        sys.stderr.write(f"error: {unwritable(cause)}\n")
        sys.exit(1)

"""The command line. One private file a command: parse → public function → render."""

from __future__ import annotations


def main() -> None:
    """Entry point of `rankfold` and `python -m rankfold`."""
    from rankfold.cli._app import app

    app()

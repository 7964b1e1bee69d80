"""Progress bars: on a terminal, with time left, and nowhere else."""

from __future__ import annotations

import io
import re
import sys

import cli_networks
import pytest

from rankfold.cli._data import Limited
from rankfold.cli._progress import Watched, expected, totalled
from rankfold.progress import progress_bar, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar() as progress, progress("statistics", 3) as advance:
        advance()
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "statistics" in written
    assert "time left" in written


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_pipe_and_a_dumb_terminal_get_none(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar() as progress, progress("statistics", 3) as advance:
        advance()
    assert progress is silent
    assert written.getvalue() == ""


def test_watched_batches_are_counted_once_in_several_passes() -> None:
    steps: list[int] = []
    data = Watched([1, 2, 3], lambda: steps.append(1))
    assert next(iter(data)) == 1
    assert list(data) == [1, 2, 3]
    assert list(data) == [1, 2, 3]
    assert len(steps) == 3


def test_the_number_of_batches_is_known_where_the_data_says_so() -> None:
    batches = cli_networks.images()
    assert expected(batches) == 4
    assert expected(Limited(batches, 11)) == 2
    assert expected(Limited(batches, 1000)) == 4
    assert expected(iter(batches)) is None


def test_totals_are_filled_in_where_they_are_unknown() -> None:
    seen: list[tuple[str, int | None]] = []

    def noting(stage: str, steps: int | None) -> object:
        seen.append((stage, steps))
        return silent(stage, steps)

    progress = totalled(noting, {"statistics": 7})  # type: ignore[arg-type]
    for stage, steps in (("statistics", None), ("statistics", 3), ("trace", None)):
        progress(stage, steps)
    assert seen == [("statistics", 7), ("statistics", 3), ("trace", None)]

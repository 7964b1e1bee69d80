"""Who is told how far work is, and how much of a whole run is left."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import OptionError
from rankfold.progress import SHARES, WholeRun, as_progress, silent

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def compressed(progress: Any) -> rf.Compressed:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return rf.compress(model, [X[:20], X[20:]], budget=rf.Budget(params=0.7), repair=None, progress=progress)


def test_a_plain_function_is_told_of_every_step_of_every_stage() -> None:
    told: list[tuple[str, int, int | None]] = []
    compressed(lambda stage, done, total: told.append((stage, done, total)))
    assert [each for each in told if each[0] == "curves"] == [("curves", done, 2) for done in (0, 1, 2)]
    assert [done for stage, done, _ in told if stage == "trace"] == [0]
    assert {"trace", "statistics", "gradients", "curves", "latency"} <= {stage for stage, _, _ in told}


@pytest.mark.parametrize(
    "given",
    [None, "bar", lambda: None, lambda stage: None, lambda a, b, c, d: None, lambda stage, steps: None, print],
    ids=["None", "text", "no argument", "one", "four", "no context", "any, no context"],
)
def test_what_cannot_be_told_is_refused_with_what_can(given: Any) -> None:
    with pytest.raises(OptionError, match=r"^progress · .* · pass rankfold.progress_bar\(\) as a context"):
        compressed(given)


def test_a_function_of_stages_is_taken_as_it_is() -> None:
    opened: list[tuple[str, int | None]] = []

    def progress(stage: str, steps: int | None) -> Any:
        opened.append((stage, steps))
        return nullcontext(lambda: None)

    with as_progress(progress)("curves", 3) as advance:
        advance()
    assert opened == [("curves", 3)]
    assert as_progress(silent) is silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_of_a_run_in_the_usual_shares_is_exact() -> None:
    clock = Clock()
    run = WholeRun(clock)
    assert run.left() is None
    for name, share in SHARES.items():
        run.begin(name, 4)
        for step in range(4):
            clock.now += 25 * share
            run.step()
            done = clock.now / 100
            assert run.fraction() == pytest.approx(done)
            assert run.left() == pytest.approx(100 - clock.now, abs=1e-9), (name, step)
        run.end()
    assert run.fraction() == pytest.approx(1)


def test_stages_inside_others_are_a_part_of_their_next_step() -> None:
    run = WholeRun(Clock())
    run.begin("trials", 4)
    run.step()
    before = run.fraction()
    run.begin("lockstep", 10)
    for _ in range(10):
        run.step()
    inside = run.fraction()
    run.end()
    run.step()
    assert before < inside == pytest.approx(run.fraction())


def test_stages_that_are_passed_over_are_no_longer_waited_for() -> None:
    run = WholeRun(Clock())
    run.begin("trace", None)
    run.end()
    before = run.fraction()
    run.begin("curves", 5)
    assert run.fraction() > before
    run.end()
    run.begin("latency", None)
    run.end()
    assert run.fraction() == pytest.approx(1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return written


def test_a_run_shows_the_time_left_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with rf.progress_bar() as progress:
        compressed(progress)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"whole run .* \d+ % time left \d:\d\d:\d\d", text)


def test_ctrl_c_leaves_the_terminal_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)

    def interrupted() -> None:
        with rf.progress_bar() as progress, progress("trace", None), progress("curves", 3) as advance:
            advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    written = terminal.getvalue()
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0  # the cursor is shown again


def test_rich_is_imported_only_where_a_bar_is_used() -> None:
    code = "import sys, rankfold; rankfold.progress_bar; sys.exit(any(name.startswith('rich') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

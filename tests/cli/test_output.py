"""Standard output that takes nothing: one line on stderr, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "rankfold.digits:trained", "--shape", "1,28,28"),
        ("inspect", "rankfold.digits:trained", "--shape", "1,28,28", "--json"),
        ("compress", "--list-methods"),
        ("--version",),
        ("--help",),
        ("compress", "--help"),
    ],
    ids=["inspect", "json", "methods", "version", "help", "help of a command"],
)
def test_a_full_standard_output_is_one_line_and_exit_code_1(words: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rankfold", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: standard output · the result can be written · got ")


def test_a_failure_prints_nothing_on_standard_output(cli: Any) -> None:
    done = cli("inspect", "rankfold.digits:trained", "--shape", "1,2", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "rankfold.digits:trained", "--shape", "1,28,28", "--json"),
        ("compress", "--list-methods"),
        ("--version",),
        ("--help",),
    ],
    ids=["json", "methods", "version", "help"],
)
def test_a_reader_that_has_read_enough_ends_the_command_without_a_line(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rankfold", *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")

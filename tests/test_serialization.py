"""Laws of JSON that may come from anywhere, and of directories that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankfold.serialization as serialization
from rankfold.errors import CheckpointError, PlanError, WriteError
from rankfold.serialization import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    canonical_json,
    parse_json,
    read_json,
    write_directory,
    write_text,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé"\\[{'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé"), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_json_round_trip_gives_the_value(value: Any) -> None:
    assert parse_json(canonical_json(value), place="here") == value


def test_equal_values_give_equal_bytes_whatever_the_order_of_their_keys() -> None:
    assert (
        canonical_json({"b": 1, "a": [2.5]})
        == canonical_json({"a": [2.5], "b": 1})
        == '{\n "a": [\n  2.5\n ],\n "b": 1\n}\n'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_what_json_cannot_hold_is_never_written(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ('{"a": 1, "a": 2}', r"each key once · got 'a' twice"),
        ("[NaN]", r"every number is finite · got NaN"),
        ("[-Infinity]", r"every number is finite · got -Infinity"),
        ("[1e999]", r"every number is finite · got 1e999"),
        ("{", r"valid JSON"),
        ("", r"valid JSON"),
        ("[1] trailing", r"valid JSON"),
        ("[" + "1" * 5000 + "]", r"valid JSON · got .*digits"),
    ],
    ids=["twice", "nan", "infinity", "overflow", "cut", "empty", "trailing", "digits"],
)
def test_json_that_breaks_a_law_is_refused_with_place_and_law(text: str, law: str) -> None:
    with pytest.raises(PlanError, match=rf"^there · .*{law}"):
        parse_json(text, place="there", error=PlanError)


def test_nesting_is_bounded_and_brackets_in_strings_are_none() -> None:
    deep = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    parse_json(deep, place="here")
    with pytest.raises(CheckpointError, match=rf"at most {MAX_JSON_DEPTH} deep · got depth {MAX_JSON_DEPTH + 1}"):
        parse_json(f"[{deep}]", place="here")
    assert parse_json(json.dumps(['"[[\\' * 100]), place="here") == ['"[[\\' * 100]


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with file.open("wb") as handle:
        handle.truncate(2**30)
    with pytest.raises(CheckpointError, match=rf"at most {MAX_JSON_BYTES} bytes · got {2**30} bytes"):
        read_json(file)


def test_a_file_of_the_largest_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_JSON_BYTES", 8)
    file = tmp_path / "value.json"
    file.write_text("[123456]")
    assert read_json(file) == [123456]
    file.write_text("[1234567]")
    with pytest.raises(CheckpointError, match="at most 8 bytes · got 9 bytes"):
        read_json(file)


def test_no_file_no_text_and_no_regular_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file exists · got no such file · check the path"):
        read_json(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="got a directory"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="got a device or pipe"):
        read_json(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b'"\xe9"')
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_json(tmp_path / "latin")


def test_a_directory_appears_with_all_its_files(tmp_path: Path) -> None:
    write_directory(tmp_path / "new" / "out", {"a": write_text("é"), "b": write_text("2")})
    assert {file.name: file.read_text("utf-8") for file in (tmp_path / "new" / "out").iterdir()} == {"a": "é", "b": "2"}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out", {"a": write_text("1")})
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    def private(file: Path) -> None:
        file.touch(mode=0o600)

    old = os.umask(0o022)
    try:
        write_directory(tmp_path / "out", {"a": private})
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o644


def test_a_taken_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_directory(tmp_path / "out", {"a": write_text("1"), "b": write_text("1")})
    with pytest.raises(WriteError, match="new or empty directory · got one with files in it, such as 'a'"):
        write_directory(tmp_path / "out", {"a": write_text("2"), "b": write_text("2")})
    assert (tmp_path / "out" / "a").read_text() == "1"
    write_directory(tmp_path / "out", {"a": write_text("2"), "b": write_text("2")}, overwrite=True)
    assert (tmp_path / "out" / "a").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_overwriting_never_loses_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"replaces nothing but a · got a directory that also holds 'thesis\.txt'"):
        write_directory(tmp_path / "out", {"a": write_text("1")}, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced_by_a_directory(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(WriteError, match="the output is a directory · got a file"):
        write_directory(tmp_path / "out", {"a": write_text("1")}, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="the output directory can be written"):
        write_directory(tmp_path / "file" / "below" / "out", {"a": write_text("1")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _full(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(_: Path) -> None:
    raise KeyboardInterrupt


def _refused(_: Path) -> None:
    raise WriteError("weights", law="they fit", got="none", cure="more room")


@pytest.mark.parametrize(
    ("writer", "error", "message"),
    [
        (_full, WriteError, "can be written · got .*No space left on device · .*nothing was left behind"),
        (_interrupted, KeyboardInterrupt, "^$"),
        (_refused, WriteError, "^weights · they fit"),
    ],
)
def test_a_writer_that_fails_leaves_nothing(
    writer: Callable[[Path], None], error: type[BaseException], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write_directory(tmp_path / "new" / "er" / "out", {"a": write_text("1"), "b": writer})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", [_full, _interrupted])
def test_a_failed_overwrite_keeps_what_was_there(writer: Callable[[Path], None], tmp_path: Path) -> None:
    write_directory(tmp_path / "out", {"a": write_text("1")})
    with pytest.raises((WriteError, KeyboardInterrupt)):
        write_directory(tmp_path / "out", {"a": write_text("2"), "b": writer}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_a_full_disk_noticed_at_the_flush_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_directory(tmp_path / "out", {"a": write_text("1")})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_between_the_two_renames_of_an_overwrite_brings_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "out", {"a": write_text("1")})
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and self.name != "out":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "out", {"a": write_text("2")}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


KILLED = """
import os, signal, sys
from pathlib import Path
from rankfold.serialization import write_directory, write_text

def killed(file):
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

write_directory(Path(sys.argv[1]), {"a": write_text("2"), "b": killed}, overwrite=True)
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_in_the_middle_leaves_the_path_as_it_was(there: bool, tmp_path: Path) -> None:
    if there:
        write_directory(tmp_path / "out", {"a": write_text("1")})
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == there
    if there:
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]
        assert (tmp_path / "out" / "a").read_text() == "1"
    hidden = [entry.name for entry in tmp_path.iterdir() if entry.name != "out"]
    assert all(name.startswith(".out.") for name in hidden)

"""The output directory is looked at before any work is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankfold.cli._out import check_out
from rankfold.errors import WriteError


def test_new_and_empty_directories_are_fine(tmp_path: Path) -> None:
    assert check_out(tmp_path, overwrite=False) == tmp_path
    assert check_out(tmp_path / "a" / "b", overwrite=False) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


def test_a_taken_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"thesis\.txt"):
        check_out(tmp_path, overwrite=False)


def test_overwrite_replaces_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "small")
    assert check_out(tmp_path / "small", overwrite=True) == tmp_path / "small"


def _add_file(folder: Path) -> None:
    (folder / "thesis.txt").write_text("mine")


def _remove_sums(folder: Path) -> None:
    (folder / "checksums.json").unlink()


@pytest.mark.parametrize("change", [_add_file, _remove_sums])
def test_overwrite_replaces_nothing_but_a_checkpoint(
    change: Callable[[Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "small")
    change(tmp_path / "small")
    with pytest.raises(WriteError, match="nothing else"):
        check_out(tmp_path / "small", overwrite=True)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="a file"):
        check_out(tmp_path / name, overwrite=True)


def test_a_read_only_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        seen.append(path)
        return not mode & os.W_OK

    monkeypatch.setattr(os, "access", access)  # root may write anywhere, so the answer is given here
    with pytest.raises(WriteError, match="read-only"):
        check_out(tmp_path / "a" / "b", overwrite=False)
    assert seen == [tmp_path]


def test_a_directory_that_cannot_be_written_costs_no_work(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("rankfold.cli._models.ModelSpec.load", no_work)
    (tmp_path / "file").write_text("mine")
    done = cli(
        "compress", "cli_networks:tiny", "cli_networks:images", "--params", "0.5", "--out", tmp_path / "file" / "below"
    )
    assert (done.code, done.out) == (1, "")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"the output directory can be written · got .* · choose another --out"):
        check_out(tmp_path / ("n" * 300), overwrite=False)

"""`rankfold demo`: what the demo finds is printed, and decides the exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankfold.errors import DependencyError


@dataclass(frozen=True)
class Found:
    ok: bool = True
    text: str = "a table\n"

    def to_json(self) -> str:
        return '{"ok": true}\n'


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """A demo that finds all in order at once; the list notes where it was to write."""
    paths: list[Path | None] = []

    def run(out: Path | None, *, progress: Any) -> Found:
        paths.append(out)
        with progress("work", 1) as advance:
            advance()
        print("a library that prints")
        return Found()

    monkeypatch.setitem(sys.modules, "rankfold.digits.demo", SimpleNamespace(run=run))
    return paths


def test_the_demo_prints_its_table(cli: Any, asked: list[Path | None]) -> None:
    done = cli("demo")
    assert (done.code, done.out.endswith("a table\n")) == (0, True)
    assert asked == [None]


@pytest.mark.usefixtures("asked")
def test_json_is_alone_on_stdout(cli: Any) -> None:
    done = cli("demo", "--json")
    assert done.json == {"ok": True}
    assert "a library that prints" in done.err


def test_out_is_handed_over(cli: Any, asked: list[Path | None], tmp_path: Path) -> None:
    cli("demo", "--out", tmp_path / "kept")
    assert asked == [tmp_path / "kept"]


def test_an_out_that_is_taken_is_refused_before_any_work(cli: Any, asked: list[Path | None], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = cli("demo", "--out", tmp_path)
    assert done.code == 1
    assert "mine.txt" in done.err
    assert asked == []


def test_a_check_that_fails_fails_the_demo(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(run=lambda out, progress: Found(ok=False, text="FAILED\n"))
    monkeypatch.setitem(sys.modules, "rankfold.digits.demo", stand_in)
    done = cli("demo")
    assert (done.code, done.out) == (1, "FAILED\n")


def test_a_missing_package_fails_the_demo_plainly(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path | None, *, progress: Any) -> Found:
        raise DependencyError("scikit-learn", law="is installed", got="none", cure="pip install 'rankfold[demo]'")

    monkeypatch.setitem(sys.modules, "rankfold.digits.demo", SimpleNamespace(run=run))
    done = cli("demo")
    assert done.code == 1
    assert "pip install 'rankfold[demo]'" in done.err


@pytest.mark.slow
def test_the_real_demo_passes_its_checks(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    done = cli("demo", "--json", "--out", tmp_path / "kept")
    assert done.code == 0, done.err
    assert all(done.json["checks"].values())
    assert (tmp_path / "kept" / "model.safetensors").is_file()

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rankfold.cost.latency
import rankfold.trials.attempts

sys.path.insert(0, str(Path(__file__).parent))  # so that `cli_networks:NAME` can be imported


@pytest.fixture(autouse=True)
def _short_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the two forwards for an instant, not for a second."""
    brief = functools.partial(rankfold.cost.latency.latency_ratio, seconds=0.0)
    monkeypatch.setattr(rankfold.cost.latency, "latency_ratio", brief)
    monkeypatch.setattr(rankfold.trials.attempts, "latency_ratio", brief)


class Result:
    """Exit code and streams of one call of the command line."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        from rankfold.cli._app import app

        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def rankfold_(*arguments: object) -> Result:
    return Result(arguments)


@pytest.fixture
def cli() -> Any:
    return rankfold_


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `cli_networks:tiny`, made by the command line once a session; tests only read it."""
    folder = tmp_path_factory.mktemp("made") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rankfold.trials.attempts,
            "latency_ratio",
            functools.partial(rankfold.cost.latency.latency_ratio, seconds=0.0),
        )
        done = rankfold_(
            "compress", "cli_networks:tiny", "cli_networks:images", "--params", "0.6", "--seed", "3", "--out", folder
        )
    assert done.code == 0, done.err
    return folder

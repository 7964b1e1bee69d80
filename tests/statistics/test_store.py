"""Statistics on disk: the same bits back, and nothing else accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rankfold.errors import CheckpointError, WriteError
from rankfold.statistics import InputGram, InputMean, Statistics
from rankfold.testing.matrices import normal


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    gram, other, mean = InputGram(), InputGram(), InputMean()
    for statistic in (gram, other, mean):
        statistic.update(normal(2, 9, 5, seed=1))
    own = {"input-gram": gram, "input-mean": mean}
    statistics = Statistics({"a.b": own, "": {"input-gram": other}}, {"samples": 9, "batches": 1, "seed": 3}, "f00d")
    statistics.save(tmp_path / "statistics")
    return tmp_path / "statistics"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "statistics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_everything_comes_back(saved: Path) -> None:
    again = Statistics.load(saved)
    assert set(again.sites) == {"a.b", ""}
    assert (again.manifest, again.fingerprint) == ({"samples": 9, "batches": 1, "seed": 3}, "f00d")
    assert again.sites["a.b"]["input-gram"].count == 9
    assert torch.equal(again.sites["a.b"]["input-gram"].total, again.sites[""]["input-gram"].total)


def test_saving_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    Statistics.load(saved).save(tmp_path / "again")
    for name in ("statistics.json", "statistics.safetensors"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_taken_directory_is_not_overwritten_unasked(saved: Path) -> None:
    statistics = Statistics.load(saved)
    with pytest.raises(WriteError):
        statistics.save(saved)
    statistics.save(saved, overwrite=True)
    assert Statistics.load(saved).fingerprint == "f00d"


def test_a_truncated_or_altered_file_is_refused(saved: Path) -> None:
    file = saved / "statistics.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="truncated or altered"):
            Statistics.load(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Statistics.load(saved)


def test_a_missing_or_malformed_header_is_refused(saved: Path) -> None:
    file = saved / "statistics.json"
    for text in ("", "[", "[]", "{}", '{"version": 99}'):
        file.write_text(text)
        with pytest.raises(CheckpointError):
            Statistics.load(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        Statistics.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": 5},
        {"counts": {"a": 5}},
        {"counts": {"a": {"input-gram": "many"}}},
        {"counts": {"a": {"no-such-statistic": 1}}},
        {"manifest": 5},
    ],
    ids=str,
)
def test_a_header_of_the_wrong_shape_is_refused(saved: Path, changes: dict[str, object]) -> None:
    edit(saved, **changes)
    with pytest.raises(CheckpointError, match="counts by site"):
        Statistics.load(saved)

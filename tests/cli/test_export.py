"""`rankfold export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.usefixtures("mended_torchvision"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TINY, IMAGES = "cli_networks:tiny", "cli_networks:images"


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_model_is_written_and_told_of(suffix: str, tmp_path: Path, cli: Any) -> None:
    file = tmp_path / f"net.{suffix}"
    done = cli("export", TINY, IMAGES, "--out", file, "--json")
    assert done.code == 0, done.err
    assert Path(done.json["path"]) == file.resolve()
    assert done.json["bytes"] == file.stat().st_size
    assert done.json["difference"] < 1e-5
    assert "run beside the model on" in cli("export", TINY, IMAGES, "--out", file, "--overwrite").out


def test_a_checkpoint_needs_its_factory(checkpoint: Path, tmp_path: Path, cli: Any) -> None:
    refused = cli("export", checkpoint, IMAGES, "--out", tmp_path / "net.pt2")
    assert refused.code == 2
    assert "--factory" in refused.err
    done = cli("export", checkpoint, IMAGES, "--factory", TINY, "--out", tmp_path / "net.pt2", "--fixed-batch")
    assert done.code == 0, done.err
    assert "samples\n" in done.out


def test_a_file_that_is_there_and_a_bad_name_are_refused(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "net.pt2").write_text("mine")
    for name in ("net.pt2", "net.txt"):
        done = cli("export", TINY, IMAGES, "--out", tmp_path / name)
        assert done.code != 0
        assert name in done.err
    assert (tmp_path / "net.pt2").read_text() == "mine"

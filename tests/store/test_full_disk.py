"""Saving onto a disk that is really full: a mount of 64 kB, where one may be made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import WriteError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 64 kB of room."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _compressed(width: int) -> rf.Compressed:
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    return rf.compress(model, [torch.randn(20, 8)], budget=rf.Budget(params=0.9), families=[rf.SVD()], repair=None)


def test_a_full_disk_is_refused_and_left_as_it_was(small_disk: Path) -> None:
    large, path = _compressed(2000), small_disk / "small"
    with pytest.raises(WriteError, match=r"small · .* can be written · got .*No space left.* · check the .*free space"):
        rf.save(large, path)
    assert list(small_disk.iterdir()) == []
    rf.save(_compressed(16), path)
    kept = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(WriteError, match="No space left"):
        rf.save(large, path, overwrite=True)
    assert [entry.name for entry in small_disk.iterdir()] == ["small"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == kept

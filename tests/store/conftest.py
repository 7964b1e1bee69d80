"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.reference.checkpoints import OUT

import rankfold as rf


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rf.save(OUT, tmp_path / "small")
    return tmp_path / "small"

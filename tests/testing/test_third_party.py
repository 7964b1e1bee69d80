"""A method of somebody else inherits the suite in four lines, in a project with pytest alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rankfold

pytestmark = pytest.mark.slow  # another interpreter that imports torch

METHOD = """
from __future__ import annotations

from dataclasses import dataclass

import torch
import rankfold
from rankfold.testing import DecompositionConformance


@rankfold.register("scaled-svd")
@dataclass(frozen=True)
class ScaledSVD(rankfold.Decomposition):
    scale: float = 1.0
    form = "matrix"

    def ranks(self, shape):
        return rankfold.SVD().ranks(shape)

    def decompose(self, weight, rank, moments):
        factors = rankfold.SVD().decompose(weight, rank, moments)
        return rankfold.MatrixFactors(factors.left * SCALE, factors.right)


class TestScaledSVD(DecompositionConformance):
    method = ScaledSVD()
    shapes = ((6, 8), (4, 3, 2, 2))
    layers = ("linear", "conv2d")
    idle = frozenset({"scale"})
"""


def run(tmp_path: Path, scale: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs_gpu: needs a CUDA device\n")
    (tmp_path / "test_mine.py").write_text(textwrap.dedent(METHOD).replace("SCALE", scale))
    source = str(Path(rankfold.__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--strict-markers"]
    environment = {"PYTHONPATH": source, "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_good_method_passes(tmp_path: Path) -> None:
    done = run(tmp_path, "1.0")
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout


def test_a_bad_method_fails_with_the_law_in_words(tmp_path: Path) -> None:
    done = run(tmp_path, "1.01")
    assert done.returncode == 1, done.stdout
    assert "FAILED test_mine.py::TestScaledSVD::test_full_rank_reconstructs[cpu]" in done.stdout
    assert "assert " in done.stdout
    assert "lost <=" in done.stdout  # the assertions of the shipped suite are spelt out too

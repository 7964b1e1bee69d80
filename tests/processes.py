"""Two processes of a test's worker, which meet in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import rankfold as rf

ROOTS = (Path(rf.__file__).parents[1], Path(__file__).parents[1])


def run_two(worker: Path, folder: Path) -> tuple[list[int], list[str]]:
    """Run `WORKER FOLDER RANK 2` for both ranks; their exit codes, and what they said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ROOTS)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], said

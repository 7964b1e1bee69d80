"""`rankfold compress` under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cli_networks
import pytest
import torch

import rankfold


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_print_once(tmp_path: Path) -> None:
    source, here = str(Path(rankfold.__file__).parents[1]), str(Path(__file__).parent)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "rankfold", "compress", "cli_networks:tiny", "cli_networks:images", "--params", "0.6"]
    done = subprocess.run(
        [*torchrun, *command, "--out", str(tmp_path / "small"), "--json"],
        env={**os.environ, "PYTHONPATH": f"{source}:{here}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    alone = rankfold.compress(cli_networks.tiny().eval(), cli_networks.images(), budget=rankfold.Budget(params=0.6))
    assert printed["plan"]["decisions"] == json.loads(alone.plan.to_json())["decisions"]
    loaded = rankfold.load(tmp_path / "small", factory=cli_networks.tiny)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))

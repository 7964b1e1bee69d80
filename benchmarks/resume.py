"""Kill and resume on the real ResNet-56: `python -m benchmarks.resume [--at 0.2 0.5 0.8]`, JSON out.

One run is left alone. Others are killed (`SIGKILL`) after a fraction of its seconds and started again with the same
work directory. Printed are the SHA-256 of all weights and the plan of each, and the seconds that were saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rankfold as rf
from benchmarks.networks import NETWORKS


def work(network: str, samples: int, folder: Path) -> None:
    """Compress in this process and print what came out."""
    loaded = NETWORKS[network]()
    data = loaded.calibration(samples, seed=0)
    start = time.perf_counter()
    out = rf.compress(loaded.model, data, budget=rf.Budget(params=0.5), work_dir=folder)
    seconds = time.perf_counter() - start
    sha = hashlib.sha256(out.plan.to_json().encode())
    for name, value in out.model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    print(json.dumps({"sha256": sha.hexdigest(), "seconds": seconds}))


def command(network: str, samples: int, folder: Path) -> list[str]:
    """The same as a process of its own."""
    parts = [sys.executable, "-m", "benchmarks.resume", "--network", network, "--samples", str(samples)]
    return [*parts, "--into", str(folder)]


def finished(line: list[str]) -> dict[str, Any]:
    """Run a command to its end."""
    result: dict[str, Any] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def killed(line: list[str], folder: Path, seconds: float) -> int:
    """Run a command for some seconds after its work directory appears, then kill it; how many files it left."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        while not folder.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds)
        process.kill()
    return sum(1 for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Kill, resume, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet56")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--at", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument("--into", type=Path, help="be one run, with this work directory")
    chosen = parser.parse_args()
    if chosen.into is not None:
        work(chosen.network, chosen.samples, chosen.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = finished(command(chosen.network, chosen.samples, Path(folder) / "whole"))
        rows = []
        for at in chosen.at:
            place = Path(folder) / f"killed-{at}"
            line = command(chosen.network, chosen.samples, place)
            files = killed(line, place, at * whole["seconds"])
            again = finished(line)
            same = again["sha256"] == whole["sha256"]
            rows.append({"killed_at": at, "files_left": files, "same_bits": same, "seconds": again["seconds"]})
    print(json.dumps({"network": chosen.network, "samples": chosen.samples, "whole": whole, "resumed": rows}, indent=2))


if __name__ == "__main__":
    main()

"""Two processes against one on the real ResNet-56: `python -m benchmarks.distributed [--processes N]`, JSON out.

Both compress at half the parameters with default options over the same images. Printed are whether the plans are equal,
whether all processes hold the same bits, the largest relative difference of the weights, `max |a − b| / max |a|` a
tensor, the two networks' error on the held-out images, and the seconds of each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import rankfold as rf
from benchmarks.networks import NETWORKS


def compressed(network: str, samples: int) -> dict[str, Any]:
    """Compress in this process, or as one of several, and say what came out."""
    loaded = NETWORKS[network]()
    data = loaded.calibration(samples, seed=0)
    start = time.perf_counter()
    out = rf.compress(loaded.model, data, budget=rf.Budget(params=0.5))
    return {
        "weights": out.model.state_dict(),
        "plan": json.loads(out.plan.to_json()),
        "error": None if out.report.comparison is None else out.report.comparison.relative_error,
        "seconds": time.perf_counter() - start,
        "stages": out.report.seconds,
    }


def launched(network: str, samples: int, processes: int, folder: Path) -> list[dict[str, Any]]:
    """The same in several processes, each started by torchrun with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "benchmarks.distributed", "--network", network, "--samples", str(samples), "--into", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def work(network: str, samples: int, folder: Path) -> None:
    """Be one of the processes."""
    dist.init_process_group("gloo")
    result = compressed(network, samples)
    torch.save(result, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def against(several: list[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """Several processes against one."""
    first = several[0]["weights"]
    differences = {
        name: float((first[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-30))
        for name, value in one["weights"].items()
    }
    worst = max(differences, key=lambda name: differences[name])
    return {
        "processes": len(several),
        "plans_equal": all(each["plan"] == one["plan"] for each in several),
        "same_bits_in_all_processes": all(
            torch.equal(each["weights"][name], value) for each in several for name, value in first.items()
        ),
        "largest_relative_difference": differences[worst],
        "at": worst,
        "error": {"one": one["error"], "several": several[0]["error"]},
        "seconds": {"one": one["seconds"], "several": max(each["seconds"] for each in several)},
        "stages": {"one": one["stages"], "several": several[0]["stages"]},
    }


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet56")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--into", type=Path, help="be one of the processes, and write there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.into is not None:
        work(chosen.network, chosen.samples, chosen.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        several = launched(chosen.network, chosen.samples, chosen.processes, Path(folder))
    result = against(several, compressed(chosen.network, chosen.samples))
    print(json.dumps({"network": chosen.network, "samples": chosen.samples, **result}, indent=2))


if __name__ == "__main__":
    main()

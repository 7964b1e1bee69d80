"""Peak memory of a compression: `python -m benchmarks.memory [--network resnet56] [--samples 4096] [--json FILE]`.

Every setting runs in a process of its own, on real weights and real calibration images. The peak is that of the
resident memory above what the process holds just before the call: model, calibration images and libraries (those of
the tracer too), after one forward pass of one batch. A sampler notes in which stage the peak was reached.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEGABYTE = 2**20
INTERVAL = 0.005  # seconds between two looks at the resident memory


def resident(name: str = "VmRSS") -> int:
    """Bytes of resident memory of this process, now (`VmRSS`) or at most so far (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


class Peaks:
    """The highest resident memory seen in every stage; also the progress that tells the stages."""

    def __init__(self) -> None:
        self.stages = ["start"]
        self.highest: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str, steps: int | None) -> Iterator[Callable[[], None]]:
        self.stages.append(stage)
        yield lambda: None
        self.stages.pop()

    def watch(self) -> None:
        while True:
            stage = self.stages[-1]
            self.highest[stage] = max(self.highest.get(stage, 0), resident())
            time.sleep(INTERVAL)


def measured(network: str, samples: int, params: float, memory: str | None, *, one: bool) -> dict[str, Any]:
    """Compress in this process; with `one` plan instead of the default's two, one after the other."""
    import torch

    import rankfold as rf
    from benchmarks.networks import NETWORKS

    loaded = NETWORKS[network]()
    calibration = [batch.clone() for batch in loaded.calibration(samples, seed=0)]
    model = loaded.model
    del loaded
    with torch.inference_mode():
        model(calibration[0])
    rf.find_sites(model, calibration[0])
    peaks = Peaks()
    resting = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest resident memory starts anew
    threading.Thread(target=peaks.watch, daemon=True).start()
    start = time.perf_counter()
    selector = rf.Uniform() if one else None
    budget = rf.Budget(params=params)
    out = rf.compress(model, calibration, budget=budget, selector=selector, memory=memory, progress=peaks)
    seconds = time.perf_counter() - start
    highest = resident("VmHWM")
    with torch.inference_mode():
        logits = torch.cat([out.model(batch) for batch in calibration[:8]])
    sha = hashlib.sha256()
    for name, value in out.model.state_dict().items():
        sha.update(name.encode() + value.contiguous().numpy().tobytes())
    return {
        "memory": memory,
        "resting": resting,
        "peak_above": highest - resting,
        "stages": {name: value - resting for name, value in peaks.highest.items()},
        "seconds": seconds,
        "sha256": sha.hexdigest(),
        "logits_norm": float(logits.norm()),
        "logits": logits.tolist(),
    }


def compared(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Relative difference of the two compressed networks' outputs on the first batches."""
    pairs = [(a, b) for rows in zip(first["logits"], second["logits"], strict=True) for a, b in zip(*rows, strict=True)]
    return float(sum((a - b) ** 2 for a, b in pairs) ** 0.5 / first["logits_norm"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--params", type=float, default=0.5)
    parser.add_argument("--memory", nargs="*", default=["none", "512MB"], help='limits; "none" is no limit')
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--here", action="store_true", help="run the one setting in this process and print JSON")
    parser.add_argument("--one", action="store_true", help="make one plan, uniform ranks, to save time")
    arguments = parser.parse_args()
    if arguments.here:
        memory = None if arguments.memory[0] == "none" else arguments.memory[0]
        print(json.dumps(measured(arguments.network, arguments.samples, arguments.params, memory, one=arguments.one)))
        return
    rows = []
    for memory in arguments.memory:
        command = [sys.executable, "-m", "benchmarks.memory", "--here", "--memory", memory]
        command += ["--network", arguments.network, "--samples", str(arguments.samples)]
        command += ["--params", str(arguments.params), *["--one"] * arguments.one]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append(row)
        stages = ", ".join(f"{name} {value / MEGABYTE:.0f}" for name, value in row["stages"].items())
        print(
            f"{arguments.network}, {arguments.samples} images, memory={memory}: "
            f"{row['peak_above'] / MEGABYTE:.0f} MB above {row['resting'] / MEGABYTE:.0f} MB at rest, "
            f"{row['seconds']:.0f} s, outputs differ by {compared(rows[0], row):.1e} ({stages})",
            flush=True,
        )
    if arguments.json:
        kept = [{name: value for name, value in row.items() if name != "logits"} for row in rows]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a dry run predicts against what the run takes: `python -m benchmarks.forecast [resnet20 mobilenet_v1 minilm]`.

Three networks at 0.7 of their parameters with the default options. Each runs in a process of its own: `dry_run=True`
first, then the same call without it. Seconds are compared whole and by stage, memory by the peak of the resident memory
above what the process holds after one forward pass of one batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks import encoder
from benchmarks.memory import MEGABYTE, Peaks, resident
from benchmarks.networks import NETWORKS


def _photographs(name: str, samples: int) -> tuple[nn.Module, list[Any]]:
    network = NETWORKS[name]()
    return network.model, network.calibration(samples, 0)


def _sentences(samples: int) -> tuple[nn.Module, list[Any]]:
    tokenizer, model = encoder.encoder()
    return model, encoder.batches(tokenizer, encoder.sentences("valid", samples), size=32)


TASKS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "resnet20": lambda: _photographs("resnet20", 512),
    "mobilenet_v1": lambda: _photographs("mobilenet_v1", 100),
    "minilm": lambda: _sentences(128),
}


def measured(name: str) -> dict[str, Any]:
    """Predict and compress in this process."""
    model, data = TASKS[name]()
    budget = rf.Budget(params=0.7)
    said = rf.compress(model, data, budget=budget, dry_run=True)
    peaks, resting, start = Peaks(), resident(), time.perf_counter()
    threading.Thread(target=peaks.watch, daemon=True).start()
    out = rf.compress(model, data, budget=budget, progress=peaks)
    seconds = time.perf_counter() - start
    return {
        "seconds": [said.total_seconds, seconds],
        "stages": {name: [said.seconds.get(name, 0.0), took] for name, took in out.report.seconds.items()},
        "peak": [said.peak_memory, max(peaks.highest.values()) - resting],
        "candidates": [sum(said.trials), len(out.report.candidates)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*TASKS, []], default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="run the one network in this process and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(measured(options.networks[0])))
        return
    for name in options.networks or TASKS:
        command = [sys.executable, "-m", "benchmarks.forecast", "--here", name, "--threads", str(options.threads)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        (said, took), (bytes_said, peak) = row["seconds"], row["peak"]
        stages = ", ".join(f"{stage} {a:.0f}/{b:.0f}" for stage, (a, b) in row["stages"].items())
        print(
            f"{name:<13} seconds predicted over true {said / took:.2f} ({said:.0f}/{took:.0f}), memory "
            f"{bytes_said / peak:.2f} ({bytes_said / MEGABYTE:.0f}/{peak / MEGABYTE:.0f} MB), candidates "
            f"{row['candidates'][0]}/{row['candidates'][1]}\n    {stages}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Benchmark runner: `python -m benchmarks.run CASE… [--seeds 3] [--json FILE]`.

Every case prints top-1 of the dense and the compressed network over the whole test set, agreement, the kept fractions,
the latency ratio, and its seconds in units of the forward pass over the same calibration inputs, measured in this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rankfold as rf
from benchmarks.cases import CASES, Case
from benchmarks.networks import NETWORKS, Network, forward_seconds
from rankfold.report.data import environment


def run_case(case: Case, network: Network, seed: int) -> dict[str, Any]:
    """Compress once and compare on the whole test set."""
    calibration = network.calibration(case.samples, seed, without=case.without)
    forward = forward_seconds(network.model, calibration)
    start = time.perf_counter()
    out = rf.compress(network.model, calibration, budget=case.budget, seed=seed, **case.options)
    seconds = time.perf_counter() - start
    seen = rf.compare(network.original, out.model, network.test)
    before, after = out.report.before, out.report.after
    return {
        "network": network.name,
        "label": case.label,
        "budget": case.budget.to_json(),
        "samples": case.samples,
        "seed": seed,
        "dense_top1": None if seen.top1 is None else seen.top1[0],
        "top1": None if seen.top1 is None else seen.top1[1],
        "agreement": seen.agreement,
        "params": after.params / before.params,
        "macs": after.macs / before.macs,
        "latency": out.report.latency,
        "forward_seconds": forward,
        "forwards": seconds / forward,
        "stages_in_forwards": {name: value / forward for name, value in out.report.seconds.items()},
        "candidates": [asdict(candidate) for candidate in out.report.candidates],
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """One line a case: mean over the seeds, with the spread of top-1."""

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in rows if row[name] is not None)

    top1 = [row["top1"] for row in rows]
    first = rows[0]
    return (
        f"{first['network']:<13}{first['label']:<50}{mean('dense_top1'):>8.4f}{mean('top1'):>8.4f}"
        f"{max(top1) - min(top1):>8.4f}{mean('agreement'):>8.4f}{mean('params'):>8.3f}{mean('macs'):>8.3f}"
        f"{mean('latency'):>8.2f}{mean('forwards'):>9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}; none runs all")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds, from 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--pick", type=int, nargs="+", help="numbers, from 0, of the cases to run")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; one of {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    networks: dict[str, Network] = {}
    rows: list[dict[str, Any]] = []
    print(
        f"{'network':<13}{'case':<50}{'dense':>8}{'top-1':>8}{'spread':>8}{'agree':>8}{'params':>8}{'macs':>8}"
        f"{'latency':>8}{'forwards':>9}"
    )
    for name in arguments.cases or CASES:
        for case in [CASES[name][i] for i in arguments.pick or range(len(CASES[name]))]:
            if case.network not in networks:
                networks[case.network] = NETWORKS[case.network]()
            own = [run_case(case, networks[case.network], seed) for seed in range(arguments.seeds)]
            rows += own
            print(summary(own), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

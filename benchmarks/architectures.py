"""The whole road on twenty architectures: trace, compress, save, load, compare.

    python -m benchmarks.architectures [NAME …] [--params 0.7] [--macs SHARE] [--reach] [--json FILE]

A row passes when the loaded model's outputs equal the compressed model's bit by bit, the counted params and MACs equal
the predicted ones, and the budget is kept. "reach" is the share of the parameters in layers that can be compressed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks.zoo import CASES, Case
from rankfold.channels.narrowing import narrow_
from rankfold.cost.counted import count
from rankfold.cost.formula import dense_cost
from rankfold.data.running import evaluating, run
from rankfold.layers.splitting import split_at
from rankfold.outputs.taken import output_tensor
from rankfold.sites.copies import copied


@dataclass(frozen=True)
class Row:
    """What one architecture gave.

    Attributes:
        name: Of the case.
        params: Of the original.
        reach: Share of them in layers that can be compressed.
        trace_seconds: Of `find_sites`: one forward, one counted forward, one export.
        nodes: Of the traced graph; 0 where the model does not export.
        sites: Layers that can be compressed.
        skips: Layers left alone, by kind of reason.
        changed: Layers that the plan makes smaller.
        kept_params: Fraction of the parameters that is left.
        kept_macs: The same of the MACs.
        error: Relative output error on held-out inputs, of random weights: only that it is a number matters here.
        bit_equal: Whether save → load gives the same bits.
        predicted: Whether predicted params and MACs equal the counted ones.
        within: Whether the budget is kept.
        compress_seconds: Of `compress`, the trace included.
        stages: The same by stage.
        forward_seconds: Of one pass over the calibration data.
    """

    name: str
    params: int
    reach: float
    trace_seconds: float
    nodes: int
    sites: int
    skips: dict[str, int]
    changed: int
    kept_params: float
    kept_macs: float
    error: float
    bit_equal: bool
    predicted: bool
    within: bool
    compress_seconds: float
    stages: dict[str, float]
    forward_seconds: float

    @property
    def passed(self) -> bool:
        return self.bit_equal and self.predicted and self.within


def outputs(model: nn.Module, data: list[Any]) -> list[torch.Tensor]:
    """The compared tensor of every batch."""
    with evaluating(model):
        return [output_tensor(run(model, batch))[0] for batch in data]


def reach(sites: rf.Sites) -> float:
    """Share of a model's parameters that lies in layers that can be compressed."""
    return sum(dense_cost(site).params for site in sites) / sites.cost.params


def examine(case: Case, budget: rf.Budget) -> Row:
    """Take one architecture along the whole road."""
    model, data = case.make(), case.data()
    start = time.perf_counter()
    sites = rf.find_sites(model, data[0])
    trace_seconds = time.perf_counter() - start
    start = time.perf_counter()
    outputs(model, data)
    forward_seconds = time.perf_counter() - start
    start = time.perf_counter()
    out = rf.compress(model, data, budget=budget)
    compress_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rf.save(out, Path(folder) / "small")
        loaded = rf.load(Path(folder) / "small", factory=lambda: case.make(seed=1))
    expected, got = outputs(out.model, data), outputs(loaded, data)
    decided = sites
    if out.plan.cuts:
        split = split_at(copied(model), sites.split)
        decided = rf.find_sites(narrow_(split, out.plan.cuts, out.plan.attributes), data[0])
    counted, promised = count(out.model, data[0]), rf.plan_cost(decided.with_fixed(), out.plan)
    return Row(
        name=case.name,
        params=sites.cost.params,
        reach=reach(sites),
        trace_seconds=trace_seconds,
        nodes=0 if sites.graph.program is None else len(sites.graph.program.graph.nodes),
        sites=len(sites),
        skips=dict(Counter(skip.kind for skip in sites.skips)),
        changed=sum(row.before != row.after for row in out.report.rows),
        kept_params=counted.params / sites.cost.params,
        kept_macs=counted.macs / max(sites.cost.macs, 1),
        error=out.report.comparison.relative_error if out.report.comparison else float("nan"),
        bit_equal=all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)),
        predicted=(counted.params, counted.macs) == (promised.params, promised.macs),
        within=all(
            amount <= share * sites.cost.amounts()[name]
            for name, amount in counted.amounts().items()
            if (share := getattr(budget, name)) is not None
        ),
        compress_seconds=compress_seconds,
        stages=dict(out.report.seconds),
        forward_seconds=forward_seconds,
    )


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = (
        "model",
        "params",
        "reach",
        "trace s",
        "nodes",
        "sites",
        "cut",
        "kept",
        "MACs",
        "same",
        "s",
        "fwd s",
        "left alone",
    )
    lines = [head] + [
        (
            row.name,
            f"{row.params:,}",
            f"{row.reach:.3f}",
            f"{row.trace_seconds:.1f}",
            str(row.nodes),
            str(row.sites),
            str(row.changed),
            f"{row.kept_params:.3f}",
            f"{row.kept_macs:.3f}",
            "yes" if row.passed else "NO",
            f"{row.compress_seconds:.1f}",
            f"{row.forward_seconds:.2f}",
            ", ".join(f"{reason} {number}" for reason, number in sorted(row.skips.items())),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all without one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file too")
    parser.add_argument("--params", type=float, help="share of the parameters; 0.7 unless --macs is given")
    parser.add_argument("--macs", type=float, help="share of the MACs")
    parser.add_argument("--reach", action="store_true", help="compress nothing, print what can be")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    params = 0.7 if options.params is None and options.macs is None else options.params
    budget = rf.Budget(params=params, macs=options.macs)
    if unknown := [name for name in options.name if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    rows: list[Row] = []
    for case in (CASES[name] for name in options.name or CASES):
        if (reason := case.missing()) is not None:
            print(f"{case.name}: left out, {reason}", file=sys.stderr)
            continue
        if options.reach:
            print(f"{case.name}  {reach(rf.find_sites(case.make(), case.data()[0])):.3f}", flush=True)
            continue
        rows.append(examine(case, budget))
        print(f"{case.name}: {'passed' if rows[-1].passed else 'FAILED'}", file=sys.stderr, flush=True)
    if options.reach:
        return 0
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

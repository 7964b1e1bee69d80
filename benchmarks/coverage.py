"""Where channels can be removed: twenty architectures, the share of their MACs in groups, and why the rest stays.

    python -m benchmarks.coverage [NAME …] [--trace-only] [--json FILE]

A row passes when the model, compressed by removal of channels alone to 0.8 of its MACs, passes the self-check, holds
the budget, and gives the same bits after saving and loading.
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

import torch

import rankfold as rf
from benchmarks.architectures import outputs
from benchmarks.zoo import CASES, Case

KEPT = 0.8


@dataclass(frozen=True)
class Coverage:
    """What one architecture's graph says of its channels.

    Attributes:
        name: Of the case.
        groups: Channel groups.
        sites: Layers that can be compressed.
        macs: Share of the model's MACs that lies in layers which make or read channels that can be removed.
        frozen: Share of the model's MACs of the layers whose output channels must stay, by reason.
        kept: MACs left by the compression; None where it was not run.
        removed: Groups that lost channels.
        agreement: On held-out inputs, of random weights, or None where no output is logits.
        passed: Whether the compression holds what the module's docstring says; None where it was not run.
        seconds: Of the compression.
        why: What the compression raised, if anything.
    """

    name: str
    groups: int
    sites: int
    macs: float
    frozen: dict[str, float]
    kept: float | None = None
    removed: int = 0
    agreement: float | None = None
    passed: bool | None = None
    seconds: float = 0.0
    why: str = ""


def examine(case: Case, *, trace_only: bool = False, kept: float = KEPT) -> Coverage:
    """Look at one architecture's channels, and remove some."""
    model, data = case.make(), case.data()
    sites = rf.find_sites(model, data[0])
    channels = rf.find_channels(model, sites)
    macs = {site.path: site.macs for site in (*sites, *sites.fixed)}
    whole = max(sites.cost.macs, 1)
    touched = {path for group in channels for path in (*group.made, *group.read)}
    touched |= {name.removesuffix(".weight") for group in channels for name in group.carried}  # depthwise layers
    inside = sum(macs[path] for path in touched & set(macs)) + sum(sum(group.macs) for group in channels)
    frozen: Counter[str] = Counter()
    for skip in channels.skips:
        frozen[_kind(skip.reason)] += macs.get(skip.path, 0)
    shares = {reason: amount / whole for reason, amount in frozen.most_common()}
    row = Coverage(case.name, len(channels), len(sites), inside / whole, shares)
    if trace_only:
        return row
    start = time.perf_counter()
    try:
        out = rf.compress(
            model,
            data,
            budget=rf.Budget(macs=kept),
            families=[rf.Interpolative()],
            selector=rf.RemovalGreedy(evenness=0.5),  # one candidate, in which most groups lose something
        )
    except rf.RankfoldError as cause:
        return Coverage(**{**asdict(row), "passed": False, "why": str(cause)})
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rf.save(out, Path(folder) / "small")
        loaded = rf.load(Path(folder) / "small", factory=lambda: case.make(seed=1))
    same = all(torch.equal(a, b) for a, b in zip(outputs(out.model, data), outputs(loaded, data), strict=True))
    left = out.report.after.macs / whole
    checked = any(note.startswith("self-check") for note in out.report.details)
    return Coverage(
        **{
            **asdict(row),
            "kept": left,
            "removed": len(out.plan.channels),
            "agreement": out.report.comparison.agreement if out.report.comparison else None,
            "passed": same and checked and left <= kept,
            "seconds": seconds,
        }
    )


def _kind(reason: str) -> str:
    """A reason without the names in it."""
    text = reason.removeprefix("frozen: ")
    for end in ("reads it, which is no layer that can be changed", "is a grouped convolution", "reads it along"):
        if end in text:
            return f"… {end}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all without one")
    parser.add_argument("--trace-only", action="store_true", help="look at the groups alone, compress nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.name if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    rows: list[Coverage] = []
    for case in (CASES[name] for name in options.name or CASES):
        if (reason := case.missing()) is not None:
            print(f"{case.name}: left out, {reason}", file=sys.stderr)
            continue
        row = examine(case, trace_only=options.trace_only)
        rows.append(row)
        state = "" if row.passed is None else "  passed" if row.passed else f"  FAILED {row.why}"
        kept = "" if row.kept is None else f"  kept {row.kept:.3f}  {row.removed} groups cut  {row.seconds:.0f} s"
        print(f"{row.name:<22}{row.groups:>4} groups {row.macs:>7.1%} of the MACs{kept}{state}", flush=True)
        for why, share in row.frozen.items():
            print(f"{'':<26}{share:>7.1%} {why}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The main job from end to end on real handwritten digits, in under a minute on two cores."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rankfold.allocation import Budget
from rankfold.api import compress
from rankfold.comparison.compare import Comparison, compare
from rankfold.decompositions import Interpolative
from rankfold.digits.data import calibration, held_out
from rankfold.digits.model import WEIGHTS, make_model, trained
from rankfold.errors import WriteError
from rankfold.outputs.taken import Logits
from rankfold.progress import Progress, silent
from rankfold.report import Report
from rankfold.serialization import canonical_json
from rankfold.store.checkpoint import load, save

BUDGET = Budget(macs=0.4)
FAMILIES = (Interpolative(multiple_of=8),)  # no layer is added, so fewer MACs take less time
LEAST_AGREEMENT = 0.9  # on the held-out scans; below it the demo counts as failed


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        report: Report of the compression.
        comparison: Comparison of both networks on the held-out scans.
        bit_equal: True if the reloaded network gives the same bits as the one that was saved, on every held-out scan.
        disk_before: Bytes of the original's weights file.
        disk_after: Bytes of the checkpoint's weights file.
        path: Directory of the checkpoint, or None where it was written to a temporary directory and removed.
        seconds: Wall-clock seconds of the whole demo, interpreter start and imports left out.
    """

    report: Report
    comparison: Comparison
    bit_equal: bool
    disk_before: int
    disk_after: int
    path: Path | None
    seconds: float

    @property
    def checks(self) -> dict[str, bool]:
        """Conditions that must hold for the demo to count as passed, by name."""
        before, after = self.report.before.amounts(), self.report.after.amounts()
        return {
            "within the budget": all(after[name] <= bound for name, bound in BUDGET.bounds(self.report.before).items()),
            "smaller in params, MACs and bytes": all(after[name] < before[name] for name in before),
            "smaller on disk": self.disk_after < self.disk_before,
            "reloaded network equal bit by bit": self.bit_equal,
            f"at least {LEAST_AGREEMENT:.0%} of the decisions kept": (self.comparison.agreement or 0)
            >= LEAST_AGREEMENT,
        }

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(self.checks.values())

    @property
    def text(self) -> str:
        """The report and a summary, as plain text."""
        seen = self.comparison
        before, after = seen.top1 if seen.top1 is not None else (float("nan"), float("nan"))
        lines = [
            self.report.text().rstrip(),
            "",
            f"held-out scans, never seen by training or calibration: {seen.samples}",
            f"  read rightly     {before:.2%} by the original, {after:.2%} by the compressed network",
            f"  same decision    {seen.agreement:.2%} ({len(seen.changed)} scans are read differently)",
            f"weights on disk: {self.disk_before:,} → {self.disk_after:,} bytes",
            f"checkpoint: {self.path if self.path is not None else 'a temporary directory, removed again'}",
            *(f"  {'ok    ' if holds else 'FAILED'} {law}" for law, holds in self.checks.items()),
            f"no training, no labels, {self.seconds:.1f} s in all",
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Canonical JSON text: the summary; the whole report is in the checkpoint's `report.json`."""
        return canonical_json(
            {
                "ok": self.ok,
                "checks": self.checks,
                "before": self.report.before.amounts(),
                "after": self.report.after.amounts(),
                "latency": self.report.latency,
                "warnings": list(self.report.warnings),
                "comparison": self.comparison.to_json(),
                "bit_equal": self.bit_equal,
                "disk_before": self.disk_before,
                "disk_after": self.disk_after,
                "path": None if self.path is None else str(self.path),
                "seconds": self.seconds,
            }
        )


def run(out: Path | None = None, *, progress: Progress = silent) -> DemoResult:
    """Compress the shipped digit network to less than half its MACs by removing channels, and check what came out.

    The calibration data are the training scans without their labels; the comparison is on scans that neither training
    nor calibration saw. The network is saved, loaded again and compared bit by bit.

    Args:
        out: New or empty directory that keeps the checkpoint; None writes to a temporary one and removes it.
        progress: Callback for every step of every stage.

    Returns:
        The result; `ok` is True if all checks hold.

    Raises:
        DependencyError: scikit-learn is not installed.
        WriteError: `out` is taken or cannot be written.
    """
    start = time.perf_counter()
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WriteError(
            str(out), law="the output is a new or empty directory", got="one that is taken", cure="choose another path"
        )
    scans = held_out()
    original = trained()
    compressed = compress(
        original, calibration(), budget=BUDGET, families=FAMILIES, outputs=Logits(), progress=progress
    )
    comparison = compare(original, compressed.model, scans, outputs=Logits())
    with tempfile.TemporaryDirectory(prefix="rankfold-demo-") as scratch:
        folder = Path(scratch) / "digits" if out is None else out
        save(compressed, folder)
        reloaded = load(folder, factory=make_model)
        size = (folder / "model.safetensors").stat().st_size
    return DemoResult(
        compressed.report,
        comparison,
        all(same_bits(compressed.model, reloaded, images) for images, _ in scans),
        WEIGHTS.stat().st_size,
        size,
        out,
        time.perf_counter() - start,
    )


@torch.no_grad()
def same_bits(first: nn.Module, second: nn.Module, images: torch.Tensor) -> bool:
    """Whether two networks in eval mode give equal outputs on a batch, bit by bit."""
    return torch.equal(first(images), second(images))

"""The result of a compression."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankfold.plan import Plan
from rankfold.report.data import Report


@dataclass(frozen=True, eq=False)
class Compressed:
    """The result of `compress`.

    Attributes:
        model: The compressed model, a plain `nn.Module`.
        plan: Plan that was carried out: every decision.
        report: Report of the changes, before and after.
    """

    model: nn.Module
    plan: Plan
    report: Report

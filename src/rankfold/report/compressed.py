"""What a compression hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankfold.plan import Plan
from rankfold.report.data import Report


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: The compressed model, a plain `nn.Module`.
        plan: What was decided.
        report: What was done, before and after.
    """

    model: nn.Module
    plan: Plan
    report: Report

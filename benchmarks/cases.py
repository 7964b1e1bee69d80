"""The benchmark cases: a name, a network, a budget and the options of the compression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import rankfold as rf


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        network: Key of `benchmarks.networks.NETWORKS`.
        budget: What is asked for.
        options: Further arguments of `rankfold.compress`.
        samples: Calibration inputs.
        label: For the table.
    """

    network: str
    budget: rf.Budget
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 1024


def _plain(network: str) -> list[Case]:
    """Without repair, at half the parameters: what the first release is measured by."""
    half = rf.Budget(params=0.5)
    return [
        Case(network, half, "SVD, uniform", {"families": [rf.SVD()], "selector": rf.Uniform()}),
        Case(network, half, "WhitenedSVD, uniform", {"families": [rf.WhitenedSVD()], "selector": rf.Uniform()}),
        Case(network, half, "WhitenedSVD, global", {"families": [rf.WhitenedSVD()], "selector": rf.Lagrangian()}),
        Case(network, half, "WhitenedSVD + SpatialSVD, best of both selectors"),
    ]


CASES: dict[str, list[Case]] = {
    "no-repair-resnet56": _plain("resnet56"),
    "no-repair-resnet20": _plain("resnet20"),
}

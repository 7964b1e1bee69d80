"""The result of carrying out a plan, and its measured latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from rankfold.comparison.compare import Comparison
from rankfold.cost.latency import Latency, latency_ratio
from rankfold.cost.resources import Cost
from rankfold.data.batches import Batch, batch_size, take
from rankfold.distributed import world
from rankfold.plan import Plan
from rankfold.report.data import Candidate
from rankfold.sites.site import Sites

LATENCY_SAMPLES = 32  # samples of a batch that are timed at most, where the model takes a batch of any size


@dataclass(frozen=True)
class Lost:
    """The divergence of the outputs of a plan of one cut on a few samples."""

    divergence: float


@dataclass(frozen=True)
class Scored:
    """The objective of a plan that was carried out."""

    value: float


@dataclass(frozen=True, eq=False)
class Attempt:
    """One plan carried out.

    Attributes:
        comparison: Comparison on the held-out samples.
        model: The compressed model.
        plan: The plan.
        details: Remarks on the repair, for the report.
        cost: Cost counted on the compressed model; None for a trial on a part of the samples, which is never returned.
        errors: Errors of the sites that a repair solved, on held-out samples, (without it, as installed), by path.
    """

    comparison: Comparison
    model: nn.Module
    plan: Plan
    details: tuple[str, ...]
    cost: Cost | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def told(self, name: str, samples: int | None = None) -> Candidate:
        """The candidate for the report, with a name, and the number of samples it was carried out on if not all."""
        return Candidate(name, self.comparison.divergence, self.comparison.agreement, False, samples)


def one_latency(original: nn.Module, compressed: nn.Module, example: Batch, samples: int | None) -> Latency:
    """Latency, measured by the first process while all others wait, so that none disturbs the measurement.

    Args:
        original: The original.
        compressed: The compressed model.
        example: One batch.
        samples: Maximum number of samples of it that are timed; None is all, where the model may take no other size.
    """
    if samples is not None:
        example = take(example, torch.arange(min(batch_size(example), samples)))
    together_with = world()
    latency = torch.zeros(3, dtype=torch.float64)
    if together_with.owns(0):
        measured = latency_ratio(original, compressed, example)
        latency = torch.tensor([measured.ratio, measured.lower, measured.upper], dtype=torch.float64)
    together_with.broadcast_([latency], 0)
    return Latency(*latency.tolist())


def uncalled(sites: Sites, plan: Plan) -> list[str]:
    """A remark on layers that the forward does not reach, where removed channels may be read by such a layer."""
    left = [skip.path for skip in sites.skips if skip.reason.startswith("not called")]
    if not left or not plan.cuts:
        return []
    return [
        f"as wide as before, though channels went: {', '.join(left)}, which the forward on the example does not "
        "reach; code that calls them elsewhere (in training, say) may find channels gone"
    ]

"""Measured speed, as a ratio of two models timed in turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from rankfold.data.batches import Batch, cloned, to_device
from rankfold.data.running import call, device_of, evaluating


@dataclass(frozen=True)
class Latency:
    """Time of the compressed forward over the original's; above 1 is slower.

    Attributes:
        ratio: Median of the pairwise ratios.
        lower: Lower quartile of these ratios: above 1, three pairs in four were slower.
        upper: Upper quartile of these ratios.
    """

    ratio: float
    lower: float
    upper: float


def latency_ratio(original: nn.Module, compressed: nn.Module, batch: Batch, *, seconds: float = 1.0) -> Latency:
    """Kept fraction of the latency, with its spread.

    The two models run in turn on one batch, so that a machine that slows down slows both, and take turns in going
    first, since what runs second finds another cache.

    Args:
        original: The original model.
        compressed: The compressed model, on the same device.
        batch: Batch that both models run on.
        seconds: Approximate duration of the measurement; at least three pairs are run.
    """
    device = device_of(original)
    moved = cloned(to_device(batch, device))

    def clock(model: nn.Module) -> float:
        start = time.perf_counter()
        call(model, moved)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    ratios: list[float] = []
    with evaluating(original), evaluating(compressed):
        clock(original), clock(compressed)  # warm up
        end = time.perf_counter() + seconds
        while len(ratios) < 3 or (time.perf_counter() < end and len(ratios) < 200):
            if len(ratios) % 2:
                before, after = clock(original), clock(compressed)
            else:
                after, before = clock(compressed), clock(original)
            ratios.append(after / max(before, 1e-9))
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(median, lower, upper)

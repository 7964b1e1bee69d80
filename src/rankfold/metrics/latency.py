"""Measured speed, as a ratio of two models timed in turn."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from rankfold.graph.trace import Batch, call, cloned, device_of, evaluating, to_device


def latency_ratio(original: nn.Module, compressed: nn.Module, batch: Batch, *, seconds: float = 1.0) -> float:
    """Kept fraction of the latency: time of the compressed forward over the original's; above 1 is slower.

    The two run in turn on one batch, so that a machine that slows down slows both; the median of the pairwise ratios
    is returned.

    Args:
        original: The original.
        compressed: The compressed model, on the same device.
        batch: What both run on.
        seconds: About how long to measure; at least three pairs are run.
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
            ratios.append(clock(compressed) / max(clock(original), 1e-9))
    return statistics.median(ratios)

"""Devices on which the conformance cases run."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def devices() -> list[Any]:
    """Parameters of a test that runs on every device: "cpu", and "cuda", skipped with a reason where there is none.

    The CUDA cases bear the marker `needs_gpu`; under `--strict-markers` register it in your own pytest configuration.
    """
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=[pytest.mark.needs_gpu, absent])]


def generator_states() -> list[torch.Tensor]:
    """State of every global generator: the CPU's, and each CUDA device's where there is one."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states


def same_states(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two results of `generator_states` are equal."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

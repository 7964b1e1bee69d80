"""What all tests share: hypothesis without chance or clock, and what skips where something is not at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from benchmarks.zoo import import_torchvision
from hypothesis import settings

settings.register_profile("rankfold", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("rankfold")

DATA = Path(os.environ.get("RANKFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {
        "needs_gpu": None if torch.cuda.is_available() else "no CUDA device",
        "needs_data": None if DATA.is_dir() else f"no networks at {DATA}",
    }
    for item in items:
        for marker, reason in absent.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def mended_torchvision() -> None:
    """Where torchvision is built for another torch, define the schemas it stumbles over at import."""
    import_torchvision()

"""Two processes that train with a penalty give what one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_two
from tests.training.ddp_worker import WAYS, train

import rankfold as rf

WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes came to."""
    folder = tmp_path_factory.mktemp("ddp")
    codes, said = run_two(WORKER, folder)
    assert codes == [0, 0], said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_same_bits_and_the_weights_of_one(way: str, ranks: list[dict[str, Any]]) -> None:
    weights, state = train(way, 0, 1)
    (first, told), (second, told_too) = ranks[0][way], ranks[1][way]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert told == told_too
    assert told["means"] == pytest.approx(state["means"], rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["", "accumulated "])
def test_both_ways_of_adding_are_one(way: str) -> None:
    added, summed = (train(f"{way}{each}", 0, 1, rf.training.NuclearNorm(0.02))[0] for each in ("gradients", "sum"))
    for name, value in summed.items():
        torch.testing.assert_close(added[name], value, rtol=1e-6, atol=1e-8)

"""Two processes give what one gives, and end together."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed_worker import BUDGET, ROADS, images, network
from tests.processes import run_two

import rankfold as rf
from rankfold.cost.latency import Latency
from rankfold.distributed import ALONE, World, world
from rankfold.trials import attempts

WORKER = Path(__file__).parent / "distributed_worker.py"
SECONDS = 20.0  # "at once", on a busy machine; the processes would wait for one another for 60


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes saw. The second kills itself at last."""
    folder = tmp_path_factory.mktemp("distributed")
    codes, said = run_two(WORKER, folder)
    assert codes == [0, -signal.SIGKILL], said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, rf.Compressed]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attempts, "latency_ratio", lambda *models: Latency(1.0, 1.0, 1.0))
            return {road: rf.compress(network(), images(road), budget=BUDGET, **ROADS[road]) for road in ROADS}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("road", ROADS)
def test_two_processes_make_the_plan_of_one(
    road: str, ranks: list[dict[str, Any]], alone: dict[str, rf.Compressed]
) -> None:
    for rank in ranks:
        assert json.loads(rank[road][1]) == json.loads(alone[road].plan.to_json())


@pytest.mark.parametrize("road", ROADS)
def test_two_processes_make_the_weights_of_one(
    road: str, ranks: list[dict[str, Any]], alone: dict[str, rf.Compressed]
) -> None:
    for name, value in alone[road].model.state_dict().items():
        torch.testing.assert_close(ranks[0][road][0][name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("road", ROADS)
def test_all_processes_end_with_the_same_bits(road: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[road][0] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ranks[0][road][1:] == ranks[1][road][1:]


@pytest.mark.parametrize("road", ROADS)
def test_the_comparison_is_over_the_samples_of_all(
    road: str, ranks: list[dict[str, Any]], alone: dict[str, rf.Compressed]
) -> None:
    got, expected = ranks[0][road][2], json.loads(json.dumps(alone[road].report.comparison.to_json()))
    assert got.keys() == expected.keys()
    assert expected["samples"] == 38
    for name, value in expected.items():
        if name == "outputs":
            for mine, theirs in zip(got[name], value, strict=True):
                assert mine == {
                    key: pytest.approx(one, rel=1e-4) if type(one) is float else one for key, one in theirs.items()
                }
            continue
        assert got[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_an_error_in_one_process_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    (mine, _, _), (theirs, text, seconds) = ranks[1]["raised"], ranks[0]["raised"]
    assert (mine, theirs) == ("ValueError", "DistributedError")
    assert "an error in process 1" in text
    assert seconds < SECONDS


def test_a_process_that_is_killed_ends_the_others(ranks: list[dict[str, Any]]) -> None:
    kind, text, seconds = ranks[0]["died"]
    assert kind == "DistributedError", text
    assert "every process answers until the end" in text
    assert seconds < SECONDS


@pytest.mark.parametrize(("case", "said"), [("other data", "same calibration data"), ("few", "1 for 2 processes")])
def test_processes_refuse_together(case: str, said: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        kind, text, _ = rank[case]
        assert kind == "DistributedError"
        assert said in text


def test_without_a_process_group_nothing_is_exchanged() -> None:
    assert world() is ALONE
    value = torch.ones(3)
    ALONE.sum_([value])
    ALONE.agree("text", "this")
    assert torch.equal(value, torch.ones(3))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_piece_of_work_has_one_owner(size: int) -> None:
    for number in range(12):
        assert sum(World(size, rank).owns(number) for rank in range(size)) == 1

"""`rankfold compress --plan`: a plan from a file is carried out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TINY = ("compress", "cli_networks:tiny", "cli_networks:images")


def edited(checkpoint: Path, tmp_path: Path, **changes: Any) -> Path:
    plan = json.loads((checkpoint / "plan.json").read_text(encoding="utf-8"))
    for key in ("channels", "cuts", "attributes"):  # decisions alone are edited here
        plan.pop(key, None)
    plan.update(changes)
    (tmp_path / "edited.json").write_text(json.dumps(plan), encoding="utf-8")
    return tmp_path / "edited.json"


def test_an_unedited_plan_gives_the_very_weights_it_was_made_for(checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--plan", checkpoint / "plan.json", "--out", tmp_path / "again")
    assert done.code == 0, done.err
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert "not the one that the plan was made with" not in done.out


def test_an_edited_plan_is_carried_out_as_edited(checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    plan = edited(
        checkpoint,
        tmp_path,
        decisions=[
            {"site": "conv1", "method": None, "rank": None},
            {"site": "conv2", "method": {"name": "svd"}, "rank": 5},
        ],
    )
    done = cli(*TINY, "--plan", plan, "--out", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    rows = {row["path"]: row for row in done.json["report"]["rows"]}
    assert (rows["conv1"]["form"], rows["conv2"]["form"], rows["conv2"]["rank"]) == ("dense", "matrix", 5)
    assert (rows["head"]["form"], rows["head"]["why"]) == ("skipped", "not in the plan")
    before, after = done.json["report"]["before"], done.json["report"]["after"]
    assert before["params"] - after["params"] == 16 * 16 * 9 - 5 * (16 * 9 + 16)


def test_other_data_than_the_plans_is_noted(checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--limit", "20", "--plan", checkpoint / "plan.json", "--out", tmp_path / "small")
    assert "not the one that the plan was made with" in done.out


def test_seed_and_positions_of_the_plan_can_be_overruled(checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    changes = ("--seed", "8", "--positions", "all")
    done = cli(*TINY, *changes, "--plan", checkpoint / "plan.json", "--out", tmp_path / "small", "--json")
    assert done.json["plan"]["seed"] == 8
    assert done.json["plan"]["calibration"]["positions"] is None


@pytest.mark.parametrize(
    "words",
    [
        *([f"--{name}", "0.5"] for name in ("params", "macs", "bytes")),
        *([f"--{name}", "uniform"] for name in ("family", "selector", "repair", "only", "exclude")),
        ["--no-weighting"],
    ],
)
def test_a_plan_says_all_that_other_options_say(words: list[str], checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--plan", checkpoint / "plan.json", *words, "--out", tmp_path / "small")
    assert done.code == 2
    assert f"got {words[0]} ·" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"bugdet": {}}, "did you mean 'budget'"),
        ({"version": 99}, "version 99"),
        ({"decisions": [{"site": "conv3", "method": {"name": "svd"}, "rank": 5}]}, "'conv1'"),
        ({"decisions": [{"site": "conv2", "method": {"name": "svd"}, "rank": 500}]}, "a rank between 1 and 16"),
        ({"decisions": [{"site": "conv2", "method": {"name": "svb"}, "rank": 5}]}, "did you mean 'svd'"),
    ],
)
def test_a_plan_that_does_not_fit_fails_and_writes_nothing(
    changes: dict[str, Any], message: str, checkpoint: Path, cli: Any, tmp_path: Path
) -> None:
    done = cli(*TINY, "--plan", edited(checkpoint, tmp_path, **changes), "--out", tmp_path / "small")
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert not (tmp_path / "small").exists()

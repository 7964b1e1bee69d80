"""Laws of the demo. It is run once, and once more where two runs are compared."""

import dataclasses
import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold as rf
from rankfold.digits import calibration, demo, held_out, make_model, trained
from rankfold.errors import WriteError

STAGES: list[str] = []


@contextmanager
def watching(stage: str, steps: Any) -> Iterator[Any]:
    STAGES.append(stage)
    yield lambda: None


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return demo.run(tmp_path_factory.mktemp("demo") / "digits", progress=watching)


def test_on_a_fifth_of_the_scans_the_demo_keeps_its_budget_and_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    few = calibration()[:2]
    monkeypatch.setattr(demo, "calibration", lambda: few)
    seen = demo.run()
    assert seen.ok, seen.text
    assert seen.report.after.macs <= 0.4 * seen.report.before.macs
    assert seen.bit_equal


@pytest.mark.slow
def test_the_demo_passes_all_its_checks(result: Any) -> None:
    assert result.ok, result.text


@pytest.mark.slow
def test_its_budget_is_never_exceeded_and_no_layer_is_added(result: Any) -> None:
    assert result.report.after.macs <= 0.4 * result.report.before.macs
    assert {row.form for row in result.report.rows if row.before != row.after} == {"channels"}


@pytest.mark.slow
def test_at_less_than_half_the_macs_at_most_two_points_of_accuracy_are_lost(result: Any) -> None:
    before, after = result.comparison.top1
    assert before >= 0.98
    assert after >= before - 0.02


@pytest.mark.slow
def test_a_kept_checkpoint_loads_into_a_network_with_the_accuracy_shown(result: Any) -> None:
    model = rf.load(result.path, factory=make_model)
    seen = rf.compare(trained(), model, held_out(), outputs=rf.Logits())
    assert seen == result.comparison


@pytest.mark.slow
def test_every_file_of_the_checkpoint_can_be_read_by_those_who_can_read_its_plan(result: Any) -> None:
    modes = {stat.S_IMODE(file.stat().st_mode) for file in result.path.iterdir()}
    assert len(modes) == 1


@pytest.mark.slow
def test_the_text_shows_size_accuracy_and_every_check_in_few_lines(result: Any) -> None:
    text = result.text
    assert len(text.splitlines()) < 25
    assert f"{result.report.after.params:,}" in text
    assert f"{result.comparison.top1[1]:.2%}" in text
    assert len(re.findall(r"^  ok     ", text, re.M)) == len(result.checks)


@pytest.mark.slow
def test_the_json_is_valid_and_says_what_the_text_says(result: Any) -> None:
    value = json.loads(result.to_json())
    assert value["ok"] is result.ok
    assert value["comparison"]["agreement"] == result.comparison.agreement
    assert value["after"]["params"] == result.report.after.params


@pytest.mark.slow
def test_progress_is_told_of_the_stages(result: Any) -> None:
    assert {"statistics", "gradients", "candidates", "lockstep"} <= set(STAGES)


@pytest.mark.slow
def test_two_runs_give_the_same_bits_and_an_unkept_checkpoint_leaves_nothing(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    again = demo.run()
    assert again.comparison == result.comparison
    assert again.report.rows == result.report.rows
    assert again.path is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_broken_promise_is_shown_as_failed(result: Any) -> None:
    larger = dataclasses.replace(result.report.after, params=result.report.before.params + 1)
    broken = [
        dataclasses.replace(result, bit_equal=False),
        dataclasses.replace(result, disk_after=result.disk_before + 1),
        dataclasses.replace(result, comparison=dataclasses.replace(result.comparison, agreement=0.5)),
        dataclasses.replace(result, report=dataclasses.replace(result.report, after=larger)),
    ]
    for each in broken:
        assert not each.ok
        assert "FAILED" in each.text


def test_a_taken_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    stages = len(STAGES)
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(WriteError, match="new or empty"):
            demo.run(taken, progress=watching)
    assert len(STAGES) == stages
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_changed_bit_is_seen() -> None:
    first, second = trained(), trained()
    images, _ = held_out()[0]
    assert demo.same_bits(first, second, images)
    with torch.no_grad():
        second.head.bias[0] += 1e-3
    assert not demo.same_bits(first, second, images)

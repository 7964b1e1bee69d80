"""A report can be read back: equal to what was written, older ones too, and a damaged one is refused with its place."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import CheckpointError, DataError
from rankfold.report.signature import Signature, TensorSpec

OLD = Path(__file__).parents[1] / "checkpoints"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


@cache
def compressed(kind: str) -> rf.Compressed:
    data = list(torch.randn(160, 16, generator=torch.Generator().manual_seed(1)).split(40))
    return rf.compress(
        net(), data, budget=rf.Budget(params=0.6), outputs=rf.Logits() if kind == "logits" else rf.Values()
    )


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_what_is_read_is_what_was_written(kind: str) -> None:
    report = compressed(kind).report
    again = rf.Report.from_json(report.to_json())
    assert again == report
    assert again.text() == report.text()
    assert again.table() == report.table()
    assert again.to_json() == report.to_json()
    assert again.comparison == report.comparison


def test_numbers_of_every_solved_layer_are_in_plan_and_report() -> None:
    data = list(torch.randn(160, 16, generator=torch.Generator().manual_seed(1)).split(40))
    out = rf.compress(net(), data, budget=rf.Budget(params=0.6), families=[rf.WhitenedSVD()], selector=rf.Lagrangian())
    solved = [row for row in out.report.rows if row.rank is not None]
    assert solved
    for row in solved:
        assert row.error == out.plan.at(row.path).error
        assert row.error is not None
        assert row.error > 0
        assert row.held_out is not None
        assert row.held_out[1] <= row.held_out[0]
    assert " → ".join(f"{each:.2g}" for each in solved[0].held_out or ()) in out.report.table(width=200)
    assert rf.Plan.from_json(out.plan.to_json()) == out.plan


def test_the_report_of_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    rf.save(compressed("values"), tmp_path / "small")
    assert rf.Report.load(tmp_path / "small" / "report.json") == compressed("values").report


@pytest.mark.parametrize("file", sorted(OLD.rglob("report.json")), ids=lambda file: str(file.parent.relative_to(OLD)))
def test_reports_of_earlier_releases_are_read(file: Path) -> None:
    report = rf.Report.load(file)
    assert report.rows
    assert report.inputs is None
    assert "params" in report.text()


def _damaged(**changes: Any) -> str:
    value = json.loads(compressed("logits").report.to_json())
    value.update(changes)
    return json.dumps({key: each for key, each in value.items() if each is not ...})


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"version": 9}, "a report of version 1"),
        ({"model": 3}, r"^report\.model"),
        ({"before": None}, r"^report\.before"),
        ({"rows": [{"path": "a"}]}, r"^report\.rows\[0\]"),
        ({"rows": ...}, "rows"),
        ({"latency": "fast"}, r"^report\.latency"),
    ],
)
def test_a_damaged_report_is_refused_with_its_place(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(CheckpointError, match=got):
        rf.Report.from_json(_damaged(**changes))
    with pytest.raises(CheckpointError):
        rf.Report.from_json("[1, 2]")


class Two(nn.Module):
    """Two tensors by name, and a flag."""

    def forward(self, x: Tensor, mask: Tensor, flag: bool = False) -> Tensor:
        return x * mask[:, None]


def test_an_example_is_built_from_the_signature() -> None:
    assert compressed("logits").report.inputs == Signature(40, (TensorSpec((40, 16), "float32"),))
    example = compressed("logits").report.inputs.example(3)  # type: ignore[union-attr]
    assert net()(example).shape == (3, 5)
    named = Signature.of({"x": torch.ones(4, 2), "mask": torch.ones(4, dtype=torch.bool), "flag": True})
    assert named.left_out == ("flag",)
    batch = named.example(2)
    assert isinstance(batch, dict)
    assert Two()(**batch).shape == (2, 2)
    assert batch["mask"].dtype == torch.bool
    with pytest.raises(DataError, match="at least 1"):
        named.example(0)

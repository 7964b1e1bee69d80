"""Laws of the report: every site and every skip is in it, and no warning is missed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.cost.resources import Cost
from rankfold.report.data import Candidate, Row
from rankfold.report.table import render_sites
from rankfold.serialization import canonical_json


def network() -> tuple[nn.Module, Tensor]:
    """A perceptron whose names look like markup, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential()
        model.add_module("[bold]", nn.Linear(10, 14))
        model.add_module("act", nn.Tanh())
        model.add_module(":smile:", nn.Linear(14, 14))
        model.add_module("tiny", nn.Linear(14, 1))
        return model.eval(), torch.randn(12, 10)


@cache
def compressed() -> tuple[nn.Module, rf.Compressed]:
    model, inputs = network()
    budget = rf.Budget(params=0.8, macs=0.9)
    return model, rf.compress(model, inputs, budget=budget, exclude=["tiny"], repair=None, weighting=False)


def test_every_site_and_every_skip_has_a_row() -> None:
    _, out = compressed()
    assert [row.path for row in out.report.rows] == [
        *(decision.site for decision in out.plan.decisions),
        *(skip.path for skip in out.plan.skips),
    ]
    assert {row.path for row in out.report.rows} == {"[bold]", ":smile:", "tiny"}
    skipped = next(row for row in out.report.rows if row.path == "tiny")
    assert (skipped.form, skipped.before, skipped.after) == ("skipped", None, None)
    assert skipped.why.startswith(("not selected", "no room"))


def test_the_rows_add_up_to_the_difference_of_the_whole() -> None:
    model, out = compressed()
    saved = sum((row.before - row.after for row in out.report.rows if row.before and row.after), Cost())
    assert out.report.before - out.report.after == saved
    assert out.report.before == count(model, torch.zeros(1, 10))
    assert out.report.after == count(out.model, torch.zeros(1, 10))


def test_the_text_names_every_row_with_its_reason_and_every_amount() -> None:
    _, out = compressed()
    text = out.report.table(width=200)
    assert str(out.report) == out.report.text()
    for row in out.report.rows:
        if row.before is None or row.after is None:
            assert row.why in text
        else:
            line = next(line for line in text.splitlines() if line.startswith(row.path))
            assert row.form in line
            assert f"{row.before.params:,}" in line
            assert f"{row.after.macs:,}" in line
            assert row.rank is None or f" {row.rank} " in line
    text = out.report.text()
    for name, amount in out.report.after.amounts().items():
        before = getattr(out.report.before, name)
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{before:,}" in line
        assert f"{amount:,}   {amount / before:.3f} kept" in line
    assert "(budget 0.8)" in text
    assert f"relative output error {out.report.comparison.relative_error:.3g}" in text  # type: ignore[union-attr]


def test_the_error_columns_show_numbers_and_no_word_of_a_person() -> None:
    _, out = compressed()
    row = Row("a", "linear", (2, 2), "matrix", "svd", 1, Cost(4, 4, 16), Cost(3, 3, 12), "because I want it")
    said = replace(row, path="b", error=0.0125, held_out=(0.2, 0.1))
    lines = replace(out.report, rows=(row, said)).table(width=200).splitlines()
    assert not any("want" in line or line.endswith(" it") for line in lines)
    assert next(line for line in lines if line.startswith("b ")).endswith(" 0.0125 0.2 → 0.1")


@pytest.mark.parametrize(
    ("latency", "spread", "slower"),
    [
        (None, None, False),
        (0.5, (0.4, 0.6), False),
        (1.004, (0.99, 1.02), False),
        (1.3, (1.0, 1.5), False),
        (2.5, (2.4, 2.6), True),
    ],
)
def test_a_result_that_is_slower_by_more_than_the_spread_is_warned_of(
    latency: float | None, spread: tuple[float, float] | None, slower: bool
) -> None:
    report = replace(compressed()[1].report, latency=latency, latency_spread=spread, comparison=None, samples=100)
    warned = [line for line in report.text().splitlines() if line.startswith("WARNING")]
    assert len(warned) == len(report.warnings) == len(json.loads(report.to_json())["warnings"]) == int(slower)
    if slower:
        assert f"SLOWER than the original here: {latency:.2f} × its time (quartiles 2.40 and 2.60)" in warned[0]
    assert any(line.startswith("latency ") for line in report.text().splitlines()) == (latency is not None)


def test_the_json_is_canonical_and_holds_everything() -> None:
    report = compressed()[1].report
    text = report.to_json()
    value = json.loads(text)
    assert canonical_json(value) == text
    assert value["version"] == 1
    assert [row["path"] for row in value["rows"]] == [row.path for row in report.rows]
    assert value["after"] == report.after.amounts()
    assert value["budget"] == {"params": 0.8, "macs": 0.9}
    assert value["comparison"]["agreement"] == report.comparison.agreement  # type: ignore[union-attr]
    assert set(value["environment"]) >= {"rankfold", "torch", "python", "machine"}
    assert value["notes"] == list(report.notes)
    assert value["seconds"].keys() == report.seconds.keys()


def test_notes_and_candidates_are_in_the_text() -> None:
    candidates = (Candidate("lagrangian", 0.25, 1.0, False), Candidate("uniform", 0.125, 1.0, True))
    text = replace(compressed()[1].report, notes=("one thing",), candidates=candidates).text()
    assert "note: one thing" in text
    assert "plans tried: 2, taken: uniform" in text
    table = replace(compressed()[1].report, candidates=candidates).table()
    assert "  lagrangian 0.25\n  uniform 0.125 (taken)\n" in table


def test_a_list_of_sites_names_every_site_skip_and_the_whole_cost() -> None:
    model, inputs = network()
    sites = rf.find_sites(model, inputs, exclude=["tiny"])
    text = render_sites(sites, width=200)
    for site in sites:
        assert any(line.startswith(site.path) and f"{site.macs:,}" in line for line in text.splitlines())
    assert all(f"  {skip.path}: {skip.reason}" in text for skip in sites.skips)
    assert f"whole model: {sites.cost.params:,} params, {sites.cost.macs:,} MACs" in text


LONG = "encoder.layers.11.attention.output.projection_of_the_values"


def _row(path: str, after: Cost | None, why: str = "") -> Row:
    before = None if after is None else Cost(4_000_000, 4_000_000, 16_000_000)
    return Row(path, "linear", (2000, 2000), "skipped" if after is None else "dense", "", None, before, after, why)


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_no_path_is_broken_and_lines_keep_to_the_width_where_they_can(width: int) -> None:
    _, out = compressed()
    rows = tuple(_row(f"{LONG}.{number}", Cost(2_000_000, 2_000_000, 8_000_000)) for number in range(3))
    lines = replace(out.report, rows=rows, notes=(), candidates=(), details=()).table(width=width).splitlines()
    table = lines
    for row in rows:
        (line,) = [line for line in table if row.path in line]
        assert "4,000,000 → 2,000,000" in (line if width == 200 else table[table.index(line) + 1])
    assert max(map(len, table)) <= max(width, 80)


def test_left_alone_names_no_layer_that_the_table_shows_as_changed_and_each_reason_once() -> None:
    _, out = compressed()
    same = Cost(4_000_000, 4_000_000, 16_000_000)
    rows = (
        _row("cut", Cost(1, 1, 4)),
        _row("kept", same),
        *(_row(f"tied.{number}", None, "tied: the weight is shared") for number in range(12)),
        _row("cut", None, "channels frozen: they are the outputs"),
        _row("kept", None, "channels frozen: they are the outputs"),
        _row("other", None, "too small"),
    )
    text = replace(out.report, rows=rows).table(width=200)
    left = text.split("left alone:\n")[1].split("\n\n")[0].splitlines()
    assert left == [
        "  12 layers (tied.0, tied.1, tied.2 and 9 more): tied: the weight is shared",
        "  kept: channels frozen: they are the outputs",
        "  other: too small",
    ]
    smaller = text.split("made smaller, but their channels stay:\n")[1].split("\n\n")[0].splitlines()
    assert smaller == ["  cut: channels frozen: they are the outputs"]

"""`rankfold compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_networks

import rankfold

TINY = "cli_networks:tiny"


def test_compare_says_what_the_library_says(checkpoint: Path, cli: Any) -> None:
    seen = rankfold.compare(
        cli_networks.tiny(), rankfold.load(checkpoint, factory=cli_networks.tiny), cli_networks.labelled()
    )
    done = cli("compare", TINY, checkpoint, "cli_networks:labelled", "--json")
    assert done.code == 0, done.err
    assert done.json["comparison"] == seen.to_json()
    assert done.json["compressed"]["cost"]["params"] <= 0.6 * done.json["original"]["cost"]["params"]
    assert done.json["latency"] > 0


def test_a_model_agrees_with_itself(cli: Any) -> None:
    done = cli("compare", TINY, TINY, "cli_networks:labelled")
    assert "agreement   1.0000 of 32 examples" in done.out
    assert "changed" not in done.out
    assert "relative error 0, largest difference 0" in done.out


def test_accuracy_is_told_where_there_are_labels(checkpoint: Path, cli: Any) -> None:
    assert "top-1" in cli("compare", TINY, checkpoint, "cli_networks:labelled").out
    assert "top-1" not in cli("compare", TINY, checkpoint, "cli_networks:images").out


def test_changed_examples_are_listed(cli: Any) -> None:
    done = cli("compare", TINY, "cli_networks:random_tiny", "cli_networks:images", "--json").json["comparison"]
    text = cli("compare", TINY, "cli_networks:random_tiny", "cli_networks:images").out
    assert done["changed"]
    assert f"changed     {len(done['changed'])}: {done['changed'][0]}" in text


def test_the_factory_of_a_checkpoint_is_the_original_unless_said(checkpoint: Path, cli: Any) -> None:
    by_original = cli("compare", TINY, checkpoint, "cli_networks:images", "--json").json
    by_option = cli(
        "compare", TINY, checkpoint, "cli_networks:images", "--factory", "cli_networks:random_tiny", "--json"
    ).json
    assert by_original["comparison"] == by_option["comparison"]
    both = cli("compare", checkpoint, checkpoint, "cli_networks:images", "--factory", TINY, "--json").json
    assert both["comparison"]["agreement"] == 1.0
    assert cli("compare", checkpoint, checkpoint, "cli_networks:images").code == 2
    assert cli("compare", TINY, TINY, "cli_networks:images", "--factory", TINY).code == 2


def test_a_limit_shortens_the_data(checkpoint: Path, cli: Any) -> None:
    done = cli("compare", TINY, checkpoint, "cli_networks:labelled", "--limit", "11", "--json")
    assert done.json["comparison"]["samples"] == 11


def test_data_that_does_not_fit_fails_without_a_traceback(cli: Any) -> None:
    done = cli("compare", TINY, TINY, "cli_networks:wrong_shape")
    assert (done.code, done.out) == (1, "")
    assert "both models run on every batch" in done.err
    assert "Traceback" not in done.err


def test_a_checkpoint_without_its_files_fails(checkpoint: Path, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((checkpoint / "plan.json").read_bytes())
    done = cli("compare", TINY, tmp_path, "cli_networks:images")
    assert done.code == 1
    assert "no such file" in done.err

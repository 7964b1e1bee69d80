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
    given = ("compare", TINY, "cli_networks:random_tiny", "cli_networks:images", "--outputs", "logits")
    done = cli(*given, "--json").json["comparison"]
    text = cli(*given).out
    assert done["changed"]
    assert f"changed     {len(done['changed'])}: {done['changed'][0]}" in text


def test_the_factory_of_a_checkpoint_is_the_original_unless_said(checkpoint: Path, cli: Any) -> None:
    by_original = cli("compare", TINY, checkpoint, "cli_networks:images", "--json").json
    by_option = cli(
        "compare", TINY, checkpoint, "cli_networks:images", "--factory", "cli_networks:random_tiny", "--json"
    ).json
    assert by_original["comparison"] == by_option["comparison"]
    both = cli("compare", checkpoint, checkpoint, "cli_networks:images", "--factory", TINY, "--json").json
    assert both["comparison"]["relative_error"] == 0
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


def test_what_the_outputs_are_can_be_said(cli: Any) -> None:
    def compared(*options: str) -> Any:
        return cli("compare", TINY, TINY, "cli_networks:images", *options)

    assert "outputs     taken for values (guessed)" in compared().out
    assert "agreement" not in compared().out
    named = compared("--outputs", "output=embedding(axis=1)").out
    assert "outputs     taken for embedding\n" in named
    assert "mean cosine 1.0000" in named
    assert "agreement   1.0000" in compared("--outputs", "logits(softening=0.5)").out
    for wrong in (("--outputs", "logit"), ("--outputs", "svd"), ("--outputs", "logits", "--outputs", "values")):
        done = compared(*wrong)
        assert (done.code, done.out) == (2, "")
        assert "--outputs" in done.err
    left = compared("--outputs", "output=none")
    assert left.code == 1
    assert "floating tensor" in left.err

"""`rankfold compress`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_networks
import pytest
import torch

import rankfold
import rankfold.api

TINY = ("compress", "cli_networks:tiny", "cli_networks:images")


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_the_checkpoint_holds_what_the_library_makes(checkpoint: Path) -> None:
    made = rankfold.compress(
        cli_networks.tiny().eval(), cli_networks.images(), budget=rankfold.Budget(params=0.6), seed=3
    )
    assert (checkpoint / "plan.json").read_text(encoding="utf-8") == made.plan.to_json()
    loaded = rankfold.load(checkpoint, factory=cli_networks.tiny)
    batch = cli_networks.images()[0]
    with torch.no_grad():
        assert torch.equal(loaded(batch), made.model(batch))


@pytest.mark.slow
def test_a_model_with_attention_is_compressed_and_loaded_by_its_own_factory(cli: Any, tmp_path: Path) -> None:
    options = ("--params", "0.5", "--selector", "uniform", "--out", tmp_path / "small")
    done = cli("compress", "cli_networks:encoder", "cli_networks:sequences", *options)
    assert done.code == 0, done.err
    model = rankfold.load(tmp_path / "small", factory=cli_networks.encoder)
    whole = sum(parameter.numel() for parameter in cli_networks.encoder().parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.5 * whole
    with torch.no_grad():
        assert torch.isfinite(model(cli_networks.sequences()[0])).all()
    done = cli("inspect", tmp_path / "small", "cli_networks:sequences", "--factory", "cli_networks:encoder")
    assert done.code == 0, done.err


def test_every_bound_is_kept(cli: Any, tmp_path: Path) -> None:
    bounds = ("--params", "0.7", "--macs", "0.8", "--bytes", "9000")
    done = cli(*TINY, *bounds, "--out", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    before, after = done.json["report"]["before"], done.json["report"]["after"]
    assert after["params"] <= 0.7 * before["params"]
    assert after["macs"] <= 0.8 * before["macs"]
    assert after["bytes"] <= 9000


def test_families_and_selector_reach_the_plan(cli: Any, tmp_path: Path) -> None:
    done = cli(
        *TINY,
        *("--params", "0.7", "--family", "svd(mirrored=true)", "--family", "svd"),
        *("--selector", "rounded(multiple=2)", "--exclude", "head", "--out", tmp_path / "small", "--json"),
    )
    assert done.code == 0, done.err
    plan = done.json["plan"]
    methods = [one["method"] for one in plan["decisions"] if one["method"]]
    assert methods
    assert {method["name"] for method in methods} == {"svd"}
    assert plan["selector"]["name"] == "rounded"
    assert all(one["rank"] % 2 == 0 for one in plan["decisions"] if one["rank"])
    assert "head" not in [one["site"] for one in plan["decisions"]]


@pytest.mark.parametrize(
    ("words", "repair"),
    [
        ([], {"name": "lockstep", "ridge": 1e-3}),
        (["--repair", "lockstep(ridge=0.5)"], {"name": "lockstep", "ridge": 0.5}),
        (["--repair", "none"], None),
    ],
)
def test_the_repair_reaches_the_plan(words: list[str], repair: dict[str, Any] | None, cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--params", "0.7", *words, "--out", tmp_path / "small", "--json")
    assert done.code == 0, done.err
    found = done.json["plan"]["repair"]
    assert (found is None) == (repair is None)
    assert repair is None or {name: found[name] for name in repair} == repair


def test_weighting_can_be_left_out(cli: Any, tmp_path: Path) -> None:
    words = (*TINY, "--params", "0.7", "--json", "--out")
    assert "gradient_samples" in cli(*words, tmp_path / "weighted").json["plan"]["calibration"]
    assert "gradient_samples" not in cli(*words, tmp_path / "plain", "--no-weighting").json["plan"]["calibration"]


def test_what_the_outputs_are_reaches_plan_and_report(cli: Any, tmp_path: Path) -> None:
    words = (*TINY, "--params", "0.7", "--json", "--out")
    named = cli(*words, tmp_path / "named", "--outputs", "output=logits(softening=0.5)").json
    kind = {"name": "logits", "axis": None, "softening": 0.5, "temperature": 1.0, "judged": 0.5}
    assert named["plan"]["calibration"]["outputs"] == {"by_name": {"output": kind}}
    assert not named["report"]["comparison"]["outputs"][0]["guessed"]
    given = ("--plan", tmp_path / "named" / "plan.json", "--outputs", "values")
    refused = cli(*TINY, *given, "--out", tmp_path / "other")
    assert refused.code == 2
    assert "--outputs" in refused.err


def test_only_chooses_sites(cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--params", "0.9", "--only", "conv*", "--out", tmp_path / "small", "--json")
    assert [one["site"] for one in done.json["plan"]["decisions"]] == ["conv1", "conv2"]


def test_the_text_tells_the_cost_and_the_place_and_every_layer_where_asked(cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--params", "0.6", "--out", tmp_path / "small")
    for word in ("params", "kept (budget 0.6)", f"saved to {tmp_path / 'small'}"):
        assert word in done.out
    assert "conv1" not in done.out
    assert files(tmp_path / "small") == ["checksums.json", "model.safetensors", "plan.json", "report.json"]
    done = cli(*TINY, "--params", "0.6", "--layers", "--out", tmp_path / "other")
    for word in ("conv1", "conv2", "head", "every layer before and after", "kept (budget 0.6)"):
        assert word in done.out


def test_keyword_data_is_understood(cli: Any, tmp_path: Path) -> None:
    import numpy as np

    rows = np.random.default_rng(0).normal(size=(2, 40, 12))
    np.savez(tmp_path / "data.npz", left=rows[0], right=rows[1])
    done = cli(
        "compress",
        "cli_networks:keyword",
        tmp_path / "data.npz",
        "--params",
        "0.8",
        "--out",
        tmp_path / "small",
        "--json",
    )
    assert done.code == 0, done.err
    assert done.json["report"]["after"]["params"] <= 0.8 * done.json["report"]["before"]["params"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a budget, or a --plan"),
        (["--params", "1.5"], "--params 1.5"),
        (["--params", "0"], "--params 0"),
        (["--macs", "nan"], "--macs nan"),
        (["--bytes", "-5"], "--bytes -5"),
        (["--params", "half"], "'half'"),
        (["--params", "0.5", "--family", "whitened"], "did you mean 'whitened-svd'"),
        (["--params", "0.5", "--selector", "unifrom"], "did you mean 'uniform'"),
        (["--params", "0.5", "--repair", "lokstep"], "did you mean 'lockstep'"),
        (["--params", "0.5", "--only", "cnv1"], "did you mean 'conv1'"),
        (["--params", "0.5", "--exclude", "no.*"], "no.*"),
        (["--params", "0.5", "--positions", "0"], "--positions 0"),
        (["--params", "0.5", "--memory", "much"], "--memory much"),
        (["--params", "0.5", "--seed", "-1"], "--seed"),
        (["--params", "0.5", "--parms", "1"], "--parms"),
        (["--plan", "nowhere.json"], "no such file"),
    ],
)
def test_bad_words_are_bad_usage_and_write_nothing(
    arguments: list[str], message: str, cli: Any, tmp_path: Path
) -> None:
    done = cli(*TINY, *arguments, "--out", tmp_path / "small")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert files(tmp_path) == []


def test_a_budget_out_of_reach_fails_and_names_the_smallest(cli: Any, tmp_path: Path) -> None:
    done = cli(*TINY, "--params", "20", "--out", tmp_path / "small")
    assert (done.code, done.out) == (1, "")
    assert "where the smallest is" in done.err
    assert files(tmp_path) == []


def test_random_weights_are_noted_in_the_report(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    stand_in = SimpleNamespace(list_models=lambda: ["tiny"], create_model=lambda name, pretrained: cli_networks.tiny())
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    done = cli("compress", "timm:tiny", "cli_networks:images", "--params", "0.6", "--out", tmp_path / "small")
    assert "weights of timm:tiny are RANDOM" in done.out
    assert "RANDOM" in (tmp_path / "small" / "report.json").read_text(encoding="utf-8")


def test_ctrl_c_leaves_nothing_behind(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for place in ("rankfold.session.collect", "rankfold.store.checkpoint.save_model"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            done = cli(*TINY, "--params", "0.6", "--out", tmp_path / "small")
        assert (done.code, done.out) == (130, "")
        assert files(tmp_path) == []


def test_ctrl_c_while_a_checkpoint_is_replaced_keeps_the_old_one(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    assert cli(*TINY, "--params", "0.6", "--out", target).code == 0
    before = (target / "plan.json").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, other: Path) -> Path:
        if Path(other) == target and self.parent == tmp_path:  # the new one, on its way into place
            raise KeyboardInterrupt
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        done = cli(*TINY, "--params", "0.9", "--out", target, "--overwrite")
    assert done.code == 130
    assert (target / "plan.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small"]
    assert cli(*TINY, "--params", "0.9", "--out", target, "--overwrite").code == 0
    assert (target / "plan.json").read_bytes() != before


@pytest.mark.slow
def test_in_a_pipe_there_is_no_progress_bar(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankfold", *TINY, "--params", "0.6", "--out", str(tmp_path / "small"), "--json"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["weights"] == "factory"


def test_the_work_directory_is_kept_and_refuses_other_work(cli: Any, tmp_path: Path) -> None:
    words = (*TINY, "--params", "0.7", "--work-dir", tmp_path / "work")
    first = cli(*words, "--out", tmp_path / "first")
    assert first.code == 0, first.err
    assert (tmp_path / "work" / "curves.json").is_file()
    assert cli(*words, "--out", tmp_path / "again").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    other = cli(*words, "--seed", "5", "--out", tmp_path / "other")
    assert other.code == 1
    assert "seed: 5 where the work is of 0" in other.err


def test_a_memory_limit_changes_no_bit(cli: Any, tmp_path: Path) -> None:
    for name, words in (("free", []), ("bound", ["--memory", "1KB"])):
        done = cli(*TINY, "--params", "0.7", *words, "--out", tmp_path / name)
        assert done.code == 0, done.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("free", "bound")]
    assert weights[0] == weights[1]


def test_a_plan_takes_no_work_directory(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    done = cli(*TINY, "--plan", tmp_path / "plan.json", "--work-dir", tmp_path / "work", "--out", tmp_path / "small")
    assert done.code == 2
    assert "--work-dir" in done.err

"""Real architectures along the whole road: sites, compression, counted equals predicted, save, load, same bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from benchmarks.architectures import examine, main, table
from benchmarks.zoo import CASES, Case

import rankfold as rf

# What must be skipped, and nothing else: kinds of reasons with how many layers they rule out.
SKIPS: dict[str, dict[str, int]] = {
    "vit_b_16": {"unsupported": 2},  # the class token and the positions
    "swin_t": {"unsupported": 12, "read elsewhere": 24},
    "googlenet": {"not called": 6},  # two auxiliary classifiers
    "timm_vit_tiny": {"unsupported": 1},
    "hf_vit": {"unsupported": 1, "read elsewhere": 1},
    "hf_bert": {"tied": 2},  # the table of the tokens and the head, whose bias has another owner too
    "hf_mixtral": {"unsupported": 4},  # two routers, two blocks of fused experts
    "hf_whisper": {"unsupported": 1, "read elsewhere": 3},
    "hf_t5": {"tied": 4, "read elsewhere": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_architecture_goes_the_whole_road(name: str) -> None:
    case = CASES[name]
    if (reason := case.missing()) is not None:
        pytest.skip(reason)
    row = examine(case, rf.Budget(params=0.7))
    assert row.bit_equal
    assert row.predicted
    assert row.within
    assert row.kept_params > 0.98 * 0.7
    assert row.nodes > 100
    assert row.changed > 0
    assert row.skips == SKIPS.get(name, {})
    assert name in table([row])


def _small(name: str) -> tuple[torch.nn.Module, list[object]]:
    case = CASES[name]
    if (reason := case.missing()) is not None:
        pytest.skip(reason)
    return case.make(), case.data()


def test_a_language_model_with_a_cache_in_its_output_exports() -> None:
    model, data = _small("hf_gpt2")
    sites = rf.find_sites(model, data[0])  # type: ignore[arg-type]
    assert sites.graph.program is not None, sites.graph.reason
    assert sites.graph.static_batch is None
    assert {site.kind for site in sites} == {"linear", "embedding"}
    assert sites.at("lm_head").path == "transformer.wte"
    assert sites.skips == ()


def test_a_layer_whose_dtype_the_parent_asks_for_stays() -> None:
    model, data = _small("hf_t5")
    skips = {skip.path: skip.reason for skip in rf.find_sites(model, data[0]).skips}  # type: ignore[arg-type]
    path = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert skips[path] == f"read elsewhere: its weight is also read by the code of {path.removesuffix('.wo')!r}"


def test_lively_weights_of_one_seed_are_the_same() -> None:
    model, data = _small("hf_resnet")
    again, _ = _small("hf_resnet")
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in model.state_dict().items())
    with torch.no_grad():
        logits = model(**data[0])["logits"]  # type: ignore[arg-type]
    assert 1e-3 < float(logits.std()) < 1e3


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = Case("x", "timm", torch.nn.Identity, lambda samples, generator: None)
    assert case.missing() == "timm is not installed"


def test_an_unknown_name_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["resnet1800"])
    assert stop.value.code == 2
    assert "no case 'resnet1800'" in capsys.readouterr().err

"""`rankfold inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_inspect_lists_sites_and_the_whole_cost(cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", "cli_networks:images")
    assert done.code == 0
    for word in ("Tiny", "conv1", "conv2", "head", "16×16×3×3", "whole model: 2,902 params"):
        assert word in done.out
    assert done.err == ""


def test_inspect_json_says_what_the_library_finds(cli: Any) -> None:
    import cli_networks

    import rankfold

    sites = rankfold.find_sites(cli_networks.tiny(), cli_networks.images()[0])
    found = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--json").json
    assert [site["path"] for site in found["sites"]] == [site.path for site in sites]
    assert [site["macs"] for site in found["sites"]] == [site.macs for site in sites]
    assert found["cost"] == sites.cost.amounts()
    assert found["skips"] == [{"path": skip.path, "reason": skip.reason} for skip in sites.skips]


def test_inspect_lists_the_layers_that_attention_is_split_into(cli: Any) -> None:
    done = cli("inspect", "cli_networks:encoder", "cli_networks:sequences")
    for word in ("q", "k", "v", "out"):
        assert f"0.layers.0.self_attn.{word}" in done.out
    assert "note: attention is split into linear layers first: 0.layers.0.self_attn" in done.out
    found = cli("inspect", "cli_networks:encoder", "cli_networks:sequences", "--json").json
    assert found["split"] == ["0.layers.0.self_attn"]
    assert found["skips"] == []


def test_inspect_lists_channel_groups_where_asked(cli: Any) -> None:
    import cli_networks

    import rankfold

    model, batch = cli_networks.tiny(), cli_networks.images()[0]
    channels = rankfold.find_channels(model, rankfold.find_sites(model, batch))
    text = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--channels").out
    assert f"{len(channels)} channel groups" in text
    assert "channels that stay:" in text
    assert "head: frozen: it is in the output of the model" in text
    found = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--channels", "--json").json
    assert [(g["group"], g["units"]) for g in found["channels"]] == [(g.name, g.units) for g in channels]
    assert found["frozen"] == [{"path": skip.path, "reason": skip.reason} for skip in channels.skips]
    assert "channels" not in cli("inspect", "cli_networks:tiny", "cli_networks:images", "--json").json


def test_a_shape_gives_the_cost_of_data_of_that_shape(cli: Any) -> None:
    by_shape = cli("inspect", "cli_networks:tiny", "--shape", "3,10,10", "--json").json
    by_data = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--json").json
    assert by_shape["cost"] == by_data["cost"]


@pytest.mark.parametrize("arguments", [[], ["cli_networks:images", "--shape", "3,10,10"]])
def test_one_of_data_and_shape_is_needed(arguments: list[str], cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", *arguments)
    assert done.code == 2
    assert "one of DATA and --shape" in done.err


def test_a_checkpoint_is_inspected_by_its_factory(checkpoint: Path, cli: Any) -> None:
    done = cli("inspect", checkpoint, "--factory", "cli_networks:tiny", "--shape", "3,10,10", "--json")
    whole = cli("inspect", "cli_networks:tiny", "--shape", "3,10,10", "--json")
    assert done.json["weights"] == "checkpoint"
    assert done.json["cost"]["params"] <= 0.6 * whole.json["cost"]["params"]


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_the_result_is_alone_on_stdout_even_beside_a_talkative_factory(option: list[str], cli: Any) -> None:
    done = cli("inspect", "cli_networks:talkative", "cli_networks:images", *option)
    assert done.code == 0
    assert "a factory that prints" not in done.out
    assert "a factory that prints" in done.err


def test_data_that_does_not_fit_fails_without_a_traceback(cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", "cli_networks:wrong_shape")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


def test_a_traceback_is_shown_when_asked_for(cli: Any) -> None:
    done = cli("inspect", "cli_networks:failing", "--shape", "3,10,10", "--traceback")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "KeyError: 'no such checkpoint'" in done.err


def test_ctrl_c_exits_with_130(cli: Any) -> None:
    done = cli("inspect", "cli_networks:interrupted", "--shape", "3,10,10")
    assert done.code == 130
    assert "Ctrl-C" in done.err


@pytest.mark.parametrize(("device", "message"), [("quda", "a device"), ("meta", "holds numbers")])
def test_a_device_that_is_none_is_bad_usage(device: str, message: str, cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", "--shape", "3,10,10", "--device", device)
    assert done.code == 2
    assert message in done.err


def test_a_budget_predicts_what_compress_would_take(cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--params", "0.5")
    assert done.code == 0
    for words in ("plans tried on a part", "layers that take most", "params: 1,451 of 2,902 asked for, reachable"):
        assert words in done.out
    found = cli("inspect", "cli_networks:tiny", "cli_networks:images", "--macs", "0.5", "--json").json["forecast"]
    assert found["bounds"].keys() == {"macs"}
    assert found["total_seconds"] > 0
    assert "forecast" not in cli("inspect", "cli_networks:tiny", "cli_networks:images", "--json").json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "3,10,10", "--params", "0.5"], "a budget needs DATA"),
        (["cli_networks:images", "--params", "2.0"], "--params 2.0"),
        (["cli_networks:images", "--params", "0.5", "--memory", "lots"], "--memory lots"),
    ],
)
def test_a_forecast_that_is_asked_for_wrongly_is_bad_usage(arguments: list[str], message: str, cli: Any) -> None:
    done = cli("inspect", "cli_networks:tiny", *arguments)
    assert done.code == 2
    assert message in done.err

"""Laws of the plan as JSON: byte-stable, versioned, editable by hand, refused with its place where it is broken."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError, RegistryError
from rankfold.install.checks import check_plan
from rankfold.sites.site import Skip
from rankfold.testing import toy_network

PLAN = rf.Plan(
    (
        rf.Decision("body.0", rf.WhitenedSVD(damping=1e-5), 3, "rank by lagrangian", 0.015),
        rf.Decision("body.1", rf.Tucker2(), (2, 5)),
        rf.Decision("head"),
    ),
    (Skip("embedding", "tied: the weight is also head.weight"),),
    "0" * 64,
    "Netz ä",
    {"params": 0.5, "macs": 1000},
    {"name": "lagrangian"},
    7,
    {"samples": 12, "sha256": "ff"},
    {"name": "lockstep", "ridge": 0.001},
)
TEXT = PLAN.to_json()


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    """The plan's JSON after a change by hand."""
    value = json.loads(TEXT)
    change(value)
    return json.dumps(value)


def test_a_plan_survives_the_round_trip() -> None:
    assert rf.Plan.from_json(TEXT) == PLAN


def test_equal_plans_give_equal_bytes() -> None:
    assert rf.Plan.from_json(TEXT).to_json() == TEXT
    shuffled = json.dumps(dict(reversed(json.loads(TEXT).items())))
    assert rf.Plan.from_json(shuffled).to_json() == TEXT


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(TEXT, "utf-8")
    assert rf.Plan.load(tmp_path / "plan.json") == PLAN


def test_what_a_person_leaves_out_takes_its_default() -> None:
    short = {"version": 1, "fingerprint": "0", "decisions": [{"site": "a", "method": {"name": "svd"}, "rank": 2}]}
    assert rf.Plan.from_json(json.dumps(short)) == rf.Plan((rf.Decision("a", rf.SVD(), 2),), (), "0")


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def _remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda value: value.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("budgets", to={}), r"^plan · only known keys · got 'budgets' · did you mean 'budget'"),
        (_set("decisions", 0, "ranks", to=3), r"^plan\.decisions\[0\] · only known keys · got 'ranks' · .*'rank'"),
        (
            _set("decisions", 0, "method", "dampling", to=1),
            r"^plan\.decisions\[0\]\.method · an option of whitened-svd · got 'dampling' · did you mean 'damping'\?",
        ),
        (_set("skips", 0, "why", to="x"), r"^plan\.skips\[0\] · only known keys · got 'why'"),
        (_set("version", to=2), r"^plan · a plan of version 1 · got version 2 · write it again"),
        (_set("version", to=True), r"a plan of version 1 · got version True"),
        (_remove("version"), r"a plan of version 1 · got version None"),
        (_remove("fingerprint"), r"the key 'fingerprint' · got keys \[.*'decisions'.* · add it"),
        (_set("decisions", 0, "rank", to=0), r"decisions\[0\] \(body\.0\) · .*rank of at least 1.* · got 0 · correct"),
        (_set("decisions", 0, "rank", to=2.0), r"rank of at least 1.* · got 2\.0"),
        (_set("decisions", 0, "rank", to=True), r"rank of at least 1.* · got True"),
        (_set("decisions", 0, "rank", to="3"), r"rank of at least 1.* · got '3'"),
        (_set("decisions", 0, "rank", to=[]), r"rank of at least 1.* · got \(\)"),
        (
            _set("decisions", 0, "rank", to=None),
            r"both null \(dense\) · got None · correct the rank, or set both to null",
        ),
        (_set("decisions", 0, "method", to=None), r"both null \(dense\) · got 3"),
        (_set("decisions", 0, "method", to="svd"), r'a method is \{"name": …'),
        (_set("decisions", 0, "method", "damping", to=-1), r"\.method · options within their ranges · got .*damping"),
        (_set("decisions", 0, "method", "damping", to="much"), r"\.method · options within their ranges"),
        (_set("decisions", 0, "site", to=3), r"^plan\.decisions\[0\]\.site · a JSON str · got 3 · correct it"),
        (_set("decisions", 0, to="body"), r"^plan\.decisions\[0\] · a JSON object · got 'body'"),
        (
            _set("decisions", 2, "site", to="body.0"),
            r"^plan · one decision a site · got two for 'body\.0' · remove one",
        ),
        (_set("decisions", to={}), r"^plan\.decisions · a JSON array · got \{\}"),
        (_set("seed", to=1.5), r"^plan\.seed · a JSON int · got 1\.5"),
        (_set("seed", to=False), r"^plan\.seed · a JSON int · got False"),
        (_set("seed", to=-1), r"^plan\.seed · an int from 0 to 2\*\*63 - 1 · got -1 · correct it"),
        (_set("seed", to=10**200), r"^plan\.seed · .* · got 10{78}… · correct it"),
        (_set("version", to=10**200), r"a plan of version 1 · got version 10{78}… · "),
        (_set("decisions", 0, "rank", to=-(10**200)), r"rank of at least 1.* · got -10{77}… · "),
        (_set("decisions", 0, "method", "damping", to=10**200), r"options within .* · got \S*damping = 10{78}.?, not"),
        (_set("budget", to={"param": 0.5}), r"^plan\.budget · only known keys · got 'param' · did you mean 'params'"),
        (_set("budget", to={"params": 1.5}), r"^plan\.budget · a kept fraction in \(0, 1\] .* · got 1\.5 · for half"),
        (_set("budget", to={"params": -(10**200)}), r"^plan\.budget · .* · got -10{77}… · for half"),
        (_set("selector", to={"name": "lagrangian", "x": 1}), r"^plan\.selector · an option of lagrangian · got 'x'"),
        (_set("selector", to={}), r'^plan\.selector · a method is \{"name": …'),
        *(
            (_set("calibration", to={"gradient_samples": samples}), r"\.gradient_samples · an int of at least 1 · got")
            for samples in (0, True, 2.0, "3", None)
        ),
        (_set("fingerprint", to="\ud800"), r"^plan · every string is Unicode text · got half a character, '\\ud800'"),
        (_set("selector", to="uniform"), r"^plan\.selector · a JSON object \| null · got 'uniform'"),
        (_set("removal", to={"name": "interpolative", "rule": "x"}), r"^plan\.removal · options within .*rule = 'x'"),
        (_set("removal", to={"name": "interpolative", "ruler": 1}), r"^plan\.removal · an option of .*mean 'rule'\?"),
        (_set("cuts", to={"a.weight": 3}), r'^plan\.cuts\.a\.weight · an object with axes such as "0" · got 3'),
        (_set("attributes", to={"a b": {"heads": "x"}}), r"^plan\.attributes\.a b · an object of whole numbers"),
        (_set("decisions", 0, "error", to=10**400), r"^plan\.decisions\[0\]\.error · a finite number · got 1000"),
        (
            _set("decisions", 0, "sitee", to="x"),
            r"^plan\.decisions\[0\] · .* 'sitee' · did you mean 'site'\?$",
        ),
        (_set("removal", to=3), r"^plan\.removal · a JSON object \| null · got 3"),
        (_set("repair", to=True), r"^plan\.repair · a JSON object \| null · got True"),
        (_set("skips", 0, "path", to=3), r"^plan\.skips\[0\]\.path · a JSON str · got 3"),
    ],
)
def test_a_broken_plan_is_refused_with_place_law_values_and_cure(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        rf.Plan.from_json(edited(change))


def test_an_unknown_method_is_refused_with_near_matches() -> None:
    with pytest.raises(
        RegistryError, match=r"'whitend-svd' · the name of a registered Decomposition · .*'whitened-svd'"
    ):
        rf.Plan.from_json(edited(_set("decisions", 0, "method", "name", to="whitend-svd")))


def test_an_unknown_selector_is_refused_with_near_matches() -> None:
    with pytest.raises(RegistryError, match=r"'unifrom' · the name of a registered Selector · .*'uniform'"):
        rf.Plan.from_json(edited(_set("selector", "name", to="unifrom")))


def test_a_selector_of_ranks_is_none_of_widths() -> None:
    with pytest.raises(RegistryError, match="'lagrangian' · the name of a registered WidthSelector"):
        rf.Plan.from_json(edited(_set("width_selector", to={"name": "lagrangian"})))


def test_no_budget_and_no_selector_are_read() -> None:
    plan = rf.Plan.from_json(edited(lambda value: value.update(budget={}, selector=None)))
    assert (plan.budget, plan.selector) == ({}, None)


def test_a_plan_without_channels_is_written_as_it_always_was() -> None:
    assert not {"removal", "width_selector", "channels", "cuts", "attributes"} & set(json.loads(TEXT))


def test_an_older_plan_whose_selector_is_that_of_the_widths_is_read() -> None:
    plan = rf.Plan.from_json(edited(_set("selector", to={"name": "same-share"})))
    assert (plan.selector, plan.removal, plan.width_selector) == ({"name": "same-share"}, None, None)


def test_a_plan_with_a_selector_of_widths_is_read_by_a_process_that_did_nothing_else() -> None:
    code = "import sys, rankfold; rankfold.Plan.from_json(sys.stdin.read())"
    text = edited(_set("width_selector", to={"name": "same-share"}))
    subprocess.run([sys.executable, "-c", code], input=text, text=True, check=True, timeout=60)


def test_a_character_written_as_two_escapes_is_read() -> None:
    assert rf.Plan.from_json(edited(_set("model", to="\U0001f600"))).model == "\U0001f600"


def test_a_list_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"^plan · a JSON object · got \[\]"):
        rf.Plan.from_json("[]")


def test_a_plan_of_depth_ten_thousand_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"version": ' + "[" * 10_000 + "]" * 10_000 + "}")
    with pytest.raises(PlanError, match=r"plan\.json · JSON is nested at most 64 deep · got depth"):
        rf.Plan.load(tmp_path / "plan.json")


def test_a_plan_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(PlanError, match=rf"at most {64 * 2**20} bytes · got {2**30} bytes"):
        rf.Plan.load(tmp_path / "plan.json")


def test_the_place_of_an_error_in_a_file_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(edited(_set("decisions", 1, "rank", to=-1)))
    with pytest.raises(PlanError, match=r"plan\.json\.decisions\[1\] \(body\.1\)"):
        rf.Plan.load(tmp_path / "plan.json")


def test_a_decision_that_is_not_there_names_near_matches() -> None:
    with pytest.raises(PlanError, match=r"'body\.2' · the plan decides on the site · .*'body\.0'"):
        PLAN.at("body.2")
    with pytest.raises(PlanError, match="no decision"):
        PLAN.with_decision(rf.Decision("boddy"))


def test_one_decision_is_replaced_and_the_others_stay() -> None:
    changed = PLAN.with_decision(rf.Decision("body.1"))
    assert changed.changes == (PLAN.decisions[0],)
    assert [decision.site for decision in changed.decisions] == ["body.0", "body.1", "head"]


# Against a model.

MODEL, INPUTS = toy_network()
CONV, LAST = "3.body.0", "9"


def plan_for(*decisions: rf.Decision, model: nn.Module = MODEL) -> rf.Plan:
    from rankfold.sites.finding import fingerprint

    return rf.Plan(decisions, (), fingerprint(model), type(model).__name__)


def refused(plan: rf.Plan, message: str) -> None:
    """The plan is refused by everything that takes one, and nothing has been changed."""
    before = copy.deepcopy(MODEL.state_dict())
    for call in (rf.apply, rf.apply_, lambda model, plan: rf.execute(model, INPUTS, plan)):
        with pytest.raises(PlanError, match=message):
            call(MODEL, plan)
    after = MODEL.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_for(rf.Decision("0", rf.SVD(), 2), model=nn.Sequential(nn.Linear(4, 4)))
    refused(
        plan, r"^Sequential · the plan is of a model with the same .* · got fingerprint .{12} against .{12} of this"
    )


def test_a_decision_on_no_module_is_refused_with_near_matches() -> None:
    refused(plan_for(rf.Decision("3.body.O", rf.SVD(), 2)), r"^'3\.body\.O' · the path of a module · .*'3\.body\.0'")


def test_a_decision_on_a_module_of_no_known_kind_is_refused() -> None:
    refused(plan_for(rf.Decision("1", rf.SVD(), 2)), r"^'1' · a layer of a known kind · got BatchNorm2d · take")


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (rf.Decision(LAST, rf.SVD(), 11), r"^'9' · a rank between 1 and 10 · got svd at rank 11 · correct the plan"),
        (rf.Decision(LAST, rf.SVD(), (2, 2)), r"a rank between 1 and 10 · got svd at rank \(2, 2\)"),
        (rf.Decision(CONV, rf.Tucker2(), (2, 13)), r"a rank between \(1, 1\) and \(12, 12\)"),
        (rf.Decision(CONV, rf.Tucker2(), 2), r"a rank between \(1, 1\) and \(12, 12\) · .* at rank 2"),
        (rf.Decision(LAST, rf.Tucker2(), (2, 2)), r"^'9' · the Tucker form needs a kernel larger than 1"),
        (rf.Decision(LAST, rf.SpatialSVD(), 2), r"^'9' · .*kernel"),
    ],
)
def test_a_rank_that_the_layer_cannot_have_is_refused(decision: rf.Decision, message: str) -> None:
    refused(plan_for(decision), message)


def test_two_decisions_on_one_module_under_two_names_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    plan = plan_for(rf.Decision("a", rf.SVD(), 2), rf.Decision("b", rf.SVD(), 3), model=model)
    with pytest.raises(PlanError, match=r"^'b' · one decision a module · got another one at 'a'.* · remove one"):
        check_plan(model, plan)


def test_a_rank_edited_by_hand_is_carried_out() -> None:
    text = plan_for(rf.Decision(CONV, rf.SVD(), 5), rf.Decision(LAST, rf.SVD(), 6)).to_json()
    value = json.loads(text)
    value["decisions"][1]["rank"] = 2
    out = rf.apply(MODEL, rf.Plan.from_json(json.dumps(value)))
    assert isinstance(out[9], nn.Sequential)
    assert out[9][0].weight.shape == (2, 16)
    assert out[3].body[0][0].weight.shape[0] == 5


def test_a_decision_edited_to_dense_leaves_the_layer_alone() -> None:
    value = json.loads(plan_for(rf.Decision(CONV, rf.SVD(), 5), rf.Decision(LAST, rf.SVD(), 6)).to_json())
    value["decisions"][1] |= {"method": None, "rank": None}
    out = rf.apply(MODEL, rf.Plan.from_json(json.dumps(value)))
    assert isinstance(out[9], nn.Linear)
    assert torch.equal(out[9].weight, MODEL[9].weight)
    assert isinstance(out[3].body[0], nn.Sequential)


def test_the_rank_of_a_repaired_plan_edited_by_hand_is_carried_out() -> None:
    plan = plan_for(rf.Decision(LAST, rf.WhitenedSVD(), 6))
    value = json.loads(plan.to_json()) | {"repair": {"name": "lockstep"}}
    value["decisions"][0]["rank"] = 3
    out = rf.execute(MODEL, INPUTS, rf.Plan.from_json(json.dumps(value)))
    assert out.model[9][0].weight.shape == (3, 16)
    assert out.plan.at(LAST).rank == 3


def test_kept_channels_are_written_once_a_group_and_older_lists_are_read() -> None:
    kept = (0, 1, 2, 5, 7, 8)
    cuts = {"a.weight": {0: kept}, "b.weight": {1: kept, 0: (1, 2)}}
    plan = replace(PLAN, channels=(rf.ChannelDecision("a", 9, kept, "width by same-share"),), cuts=cuts)
    written = json.loads(plan.to_json())
    assert written["channels"][0]["kept"] == "0-2,5,7-8"
    assert written["cuts"] == {"a.weight": {"0": "as a"}, "b.weight": {"0": "1-2", "1": "as a"}}
    assert rf.Plan.from_json(plan.to_json()) == plan
    written["channels"][0]["kept"] = list(kept)
    written["cuts"] = {name: {str(axis): list(own) for axis, own in axes.items()} for name, axes in cuts.items()}
    assert rf.Plan.from_json(json.dumps(written)) == plan
    written["cuts"]["a.weight"]["0"] = "as c"
    with pytest.raises(PlanError, match=r"cuts\.a\.weight\.0 · ascending indices of what stays"):
        rf.Plan.from_json(json.dumps(written))

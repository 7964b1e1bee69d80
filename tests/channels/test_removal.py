"""Channels that go: the structure stays, the budget holds, what others predict costs nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.reference.removable import NETWORKS, Residual, error_of, images, made
from torch import Tensor, nn

import rankfold as rf
from rankfold.channels.narrowing import narrow_
from rankfold.cost.counted import count
from rankfold.decompositions._interpolative import RULES
from rankfold.errors import BudgetError, OptionError, PlanError, SiteError
from rankfold.install import swap
from rankfold.plan import Plan
from rankfold.proposals._remover import Remover
from rankfold.registry import to_json
from rankfold.sites.finding import find_sites
from rankfold.statistics.collect import collect


@pytest.mark.parametrize("repair", [rf.Lockstep(), None], ids=["lockstep", "fold alone"])
@pytest.mark.parametrize("budget", [rf.Budget(params=0.6), rf.Budget(macs=0.6)], ids=["params", "macs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_structure_stays_and_the_budget_holds(
    name: str, budget: rf.Budget, repair: rf.Lockstep | None, tmp_path: Path
) -> None:
    model, data = made(name), images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = rf.compress(model, data, budget=budget, families=[rf.Interpolative()], repair=repair)
    assert [type(m) for m in out.model.modules()] == [type(m) for m in model.modules()]
    assert list(out.model.state_dict()) == list(model.state_dict())
    amounts, whole = out.report.after.amounts(), out.report.before.amounts()
    for resource, bound in budget.bounds(out.report.before).items():
        assert 0.8 * bound <= amounts[resource] <= bound
    assert amounts["params"] < whole["params"]
    assert out.report.after == count(out.model, data[0])
    rows = sum(row.after.params for row in out.report.rows if row.after is not None)
    norms = sum(
        p.numel() for m in out.model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for p in m.parameters()
    )
    assert rows + norms == amounts["params"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rf.save(out, tmp_path / "small")
    again = rf.load(tmp_path / "small", factory=lambda: made(name))
    with torch.no_grad():
        assert torch.equal(again(data[0]), out.model(data[0]))
    assert Plan.load(tmp_path / "small" / "plan.json") == out.plan


def test_repair_beats_the_fold_and_the_fold_beats_cutting() -> None:
    model, data, fresh = made("residual"), images(400), images(200, seed=0)
    errors = []
    for fold, repair in ((True, rf.Lockstep()), (True, None), (False, None)):
        method = rf.Interpolative(rule="magnitude", fold=fold)
        out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[method], repair=repair)
        errors.append(error_of(model, out.model, fresh))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("repair", [rf.Lockstep(), None], ids=["lockstep", "fold alone"])
def test_channels_that_others_predict_exactly_go_without_an_error(repair: rf.Lockstep | None) -> None:
    model, data = made("residual"), images(200)
    twin, norm = model.a1, model.m1
    with torch.no_grad():
        twin.weight[8:] = twin.weight[:8]
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[8:] = tensor[:8]
    out = rf.compress(
        model,
        data,
        budget=rf.Budget(params=0.85),
        families=[rf.Interpolative()],
        repair=repair,
        only=["a1", "b1", "a2", "b2"],
    )
    decision = next(decision for decision in out.plan.channels if decision.group == "a1")
    assert len(decision.kept) <= 12
    with torch.no_grad():
        values = F.relu(model.m1(model.a1(F.relu(model.n0(model.stem(torch.cat(data)))))))
    values = values.movedim(1, -1).flatten(0, -2).double()
    kept = torch.cat([values[:, list(decision.kept)], torch.ones(len(values), 1, dtype=values.dtype)], 1)
    predicted = kept @ torch.linalg.lstsq(kept, values, driver="gelsd").solution
    assert float((predicted - values).norm() / values.norm()) < 5e-3
    assert error_of(model, out.model, data) < 2e-3


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_a_network_of_the_size_asked(rule: str) -> None:
    model, data = made("separable"), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.7), families=[rf.Interpolative(rule=rule)])
    assert out.report.after.params <= 0.7 * out.report.before.params
    again = rf.compress(model, data, budget=rf.Budget(params=0.7), families=[rf.Interpolative(rule=rule)])
    assert out.plan == again.plan
    assert all(torch.equal(a, b) for a, b in zip(out.model.parameters(), again.model.parameters(), strict=True))


def test_the_heads_a_module_counts_are_counted_anew() -> None:
    model, data = made("packed"), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()], selector=rf.SameShare())
    heads = len(next(decision for decision in out.plan.channels if decision.group == "qkv").kept)
    assert heads < 4
    assert out.plan.attributes == {"": {"num_heads": heads, "attn_dim": 6 * heads}}
    assert (out.model.num_heads, out.model.head_dim, out.model.attn_dim) == (heads, 6, 6 * heads)
    assert (model.num_heads, model.attn_dim) == (4, 24)
    groups = out.model.norm
    assert groups.num_groups < 8
    assert (groups.num_channels, len(groups.weight)) == (2 * groups.num_groups, 2 * groups.num_groups)
    wrong = replace(out.plan, attributes={"": {"heads": 2}})
    with pytest.raises(PlanError, match="a whole number that a module of the model keeps"):
        rf.apply(model, wrong, data)
    edited = json.loads(out.plan.to_json())
    edited["attributes"][""]["num_heads"] = 0
    with pytest.raises(PlanError, match="whole numbers of at least 1"):
        Plan.from_json(json.dumps(edited))


def test_kept_units_are_multiples() -> None:
    method = rf.Interpolative(multiple_of=4)
    out = rf.compress(made("residual"), images(), budget=rf.Budget(params=0.6), families=[method])
    assert out.plan.channels
    assert all(len(decision.kept) % 4 == 0 for decision in out.plan.channels)


def test_channels_and_ranks_share_one_budget() -> None:
    model, data = made("residual"), images(200)
    out = rf.compress(model, data, budget=rf.Budget(params=0.5), families=[rf.WhitenedSVD(), rf.Interpolative()])
    assert out.report.after.params <= 0.5 * out.report.before.params
    names = {candidate.selector for candidate in out.report.candidates}
    assert names >= {"lagrangian", "channels", "channels + lagrangian"}
    assert sum(candidate.taken for candidate in out.report.candidates) == 1
    whole = [candidate for candidate in out.report.candidates if candidate.samples is None]
    best = min(whole, key=lambda candidate: candidate.divergence)
    assert best.taken


@pytest.mark.parametrize("repair", [rf.Lockstep(), None], ids=["lockstep", "fold alone"])
@pytest.mark.parametrize("name", ["residual", "packed"])
def test_in_place_gives_the_same_bits(name: str, repair: rf.Lockstep | None) -> None:
    model, data = made(name), images()
    out = rf.compress(
        model, data, budget=rf.Budget(params=0.6), families=[rf.WhitenedSVD(), rf.Interpolative()], repair=repair
    )
    plans = [out.plan]
    plans.append(rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()]).plan)
    assert plans[1].cuts
    for plan in plans:
        target = copy.deepcopy(model)
        kept = {key: value for key, value in target.named_parameters() if key not in plan.cuts}
        assert rf.apply_(target, plan, data) is target
        expected = rf.apply(model, plan, data)
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), target.parameters(), strict=True))
        with torch.no_grad():
            assert torch.equal(expected(data[0]), target(data[0]))
        own = dict(target.named_parameters())
        assert not plan.cuts or all(own[key] is value for key, value in kept.items() if key in own)


@pytest.mark.parametrize("stopped_at", ["narrow_", "swap", "_take_tensors"])
def test_ctrl_c_in_place_leaves_the_model_as_it_was(stopped_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made("packed"), images()
    families = [rf.WhitenedSVD(), rf.Interpolative()]
    plan = rf.compress(model, data, budget=rf.Budget(params=0.6), families=families).plan
    if not (plan.cuts and plan.changes):
        plan = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()]).plan
    before, kinds = copy.deepcopy(model.state_dict()), str(model)
    with torch.no_grad():
        expected = model(data[0])
    rightly, calls = getattr(swap, stopped_at), []

    def interrupted(*arguments: Any) -> Any:
        result = rightly(*arguments)
        calls.append(1)
        if arguments[0] is model or len(calls) == 5:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(swap, stopped_at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        rf.apply_(model, plan, data)
    monkeypatch.undo()
    assert str(model) == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(data[0]), expected)


def test_the_smallest_value_named_can_be_reached() -> None:
    model, data = made("residual"), images()
    with pytest.raises(BudgetError) as caught:
        rf.compress(model, data, budget=rf.Budget(params=1), repair=None, weighting=False)
    smallest = caught.value.smallest["params"]
    out = rf.compress(model, data, budget=rf.Budget(params=smallest), repair=None, weighting=False)
    assert out.report.after.params <= smallest


def test_a_plan_is_carried_out_again_to_the_same_bits() -> None:
    model, data = made("residual"), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()])
    plan = Plan.from_json(out.plan.to_json())
    for again in (rf.execute(model, data, plan).model, rf.apply(model, plan, data)):
        assert all(torch.equal(a, b) for a, b in zip(out.model.parameters(), again.parameters(), strict=True))


def _dead(model: nn.Module) -> None:
    with torch.no_grad():
        model.a1.weight.zero_()
        model.m1.bias.zero_()
        model.m1.running_mean.zero_()


def _constant(model: nn.Module) -> None:
    with torch.no_grad():
        model.m1.weight[3] = 0
        model.m1.bias[3] = 1


@pytest.mark.parametrize("kind", ["dead", "constant", "few samples"])
def test_degenerate_channels_are_no_error(kind: str) -> None:
    model, data = made("residual"), images(6 if kind == "few samples" else 80)
    {"dead": _dead, "constant": _constant, "few samples": lambda _: None}[kind](model)
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in out.model.parameters())
    if kind == "dead":
        assert len(next(d for d in out.plan.channels if d.group == "a1").kept) <= 2


def test_a_model_that_reads_its_own_width_is_no_crash() -> None:
    class Fixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.n0(self.stem(x)))
            h = h + self.n1(self.b1(F.relu(self.m1(self.a1(h)).reshape(-1, 16, 8, 8))))
            y: Tensor = self.head(h.mean((2, 3)))
            return y

    torch.manual_seed(0)
    model, data = Fixed().eval(), images()
    out = rf.compress(model, data, budget=rf.Budget(params=0.8), families=[rf.Interpolative()])
    assert "a1" not in {decision.group for decision in out.plan.channels}
    skip = next(row for row in out.report.rows if row.form == "skipped" and row.path == "a1")
    assert "the model fails without some of them" in skip.why


def test_bad_input_is_refused_by_name() -> None:
    model, data = made("residual"), images()
    with pytest.raises(OptionError, match=r"Interpolative\.rule"):
        rf.Interpolative(rule="best")
    with pytest.raises(OptionError, match=r"Interpolative\.multiple_of"):
        rf.Interpolative(multiple_of=0)
    with pytest.raises(OptionError, match=r"Interpolative\.fold"):
        rf.Interpolative(fold=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="put it in brackets"):
        rf.compress(model, data, budget=rf.Budget(params=0.6), families=rf.Interpolative())  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="the smallest"):
        rf.compress(model, data, budget=rf.Budget(params=0.001), families=[rf.Interpolative()])
    with pytest.raises(SiteError, match="there are channels that can be removed"):
        rf.compress(
            nn.Linear(12, 10), [torch.randn(20, 12)], budget=rf.Budget(params=0.6), families=[rf.Interpolative()]
        )
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Interpolative()])
    name = next(iter(out.plan.cuts))
    wrong = replace(out.plan, cuts={**out.plan.cuts, name: {0: (999,)}})
    with pytest.raises(PlanError, match="indices that stay along axis 0"):
        rf.apply(model, wrong, data)
    one = dict(out.plan.cuts)
    group = out.plan.channels[0].group
    one[f"{group}.weight"] = {**one[f"{group}.weight"], 0: one[f"{group}.weight"][0][1:]}
    norms = {name: axes for name, axes in out.plan.cuts.items() if not name.endswith("running_var")}
    for broken in (one, norms):
        with pytest.raises(
            PlanError,
            match="keep the same output channels" if broken is norms else "the model runs as the cuts leave it",
        ):
            rf.apply(model, replace(out.plan, cuts=broken), data)
    with pytest.raises(PlanError, match="cuts list what stays"):
        rf.apply(model, replace(out.plan, cuts={}), data)
    with pytest.raises(PlanError, match="a group is named by a layer"):
        rf.apply(model, replace(out.plan, channels=(replace(out.plan.channels[0], group="a9"),)), data)
    edited = json.loads(out.plan.to_json())
    edited["channels"][0]["kept"] += ",99999"
    with pytest.raises(PlanError, match="ascending indices of what stays"):
        Plan.from_json(json.dumps(edited))


@pytest.mark.parametrize(
    ("families", "ranks"),
    [([], None), ([rf.WhitenedSVD()], to_json(rf.Uniform()))],
    ids=["channels alone", "channels and ranks"],
)
def test_the_plan_records_family_widths_and_ranks_that_were_chosen(
    families: list[rf.Family], ranks: dict[str, object] | None
) -> None:
    model, data = made("residual"), images()
    family, widths = rf.Interpolative(rule="magnitude", multiple_of=2, fold=False), rf.SameShare()
    sites = find_sites(model, data[0]).with_fixed()
    stats = collect(model, data, sites=sites)
    remover = Remover.of(model, data[0], sites, stats, family)
    plan = remover.plan(
        rf.Budget(params=0.6),
        share=0.5 if families else 1,
        sizes=widths,
        families=[each for each in families if isinstance(each, rf.Decomposition)],
        selector=rf.Uniform(),
        seed=0,
        repair=None,
    )
    assert plan.channels
    again = rf.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.removal == to_json(family)
    assert again.width_selector == to_json(widths)
    assert again.selector == ranks


def test_cuts_of_another_model_are_refused_before_anything_is_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"3\.weight · a tensor of the model that is cut"):
        narrow_(model, {"0.weight": {0: (0, 1)}, "3.weight": {1: (0, 1)}}, {"0": {"out_features": 2}})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model[0].out_features == 6

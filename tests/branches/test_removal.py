"""Branches that go: what only fed them leaves the module tree, and the layers after them take up what they did."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.branching import NETWORKS, Encoder, inputs, made
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.errors import BudgetError, OptionError, PlanError, SiteError
from rankfold.layers.stands import Bypass, Constant, Stand
from rankfold.plan import Plan
from rankfold.sites.finding import find_sites

REFUSED = "in place", "blocks.1.conv2"  # adds a projection of another width in place


@pytest.mark.parametrize("name", NETWORKS)
def test_branches_go_until_the_budget_holds(name: str, tmp_path: Path) -> None:
    model, data = made(name), inputs(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    budget = rf.Budget(params=0.75)
    out = rf.compress(model, data, budget=budget, families=[rf.Branches()])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert out.report.after == count(out.model, data[0])
    assert out.report.after.params <= 0.75 * out.report.before.params
    assert out.plan.branches
    gone = [decision.site for decision in out.plan.decisions if decision.gone]
    left = dict(out.model.named_modules())
    assert {branch.branch for branch in out.plan.branches} <= set(gone)
    assert not any(isinstance(left.get(path), (nn.Linear, nn.Conv2d)) for path in gone)
    assert all(isinstance(left[path], (Bypass, Constant)) for path in out.plan.stands)
    assert {row.path for row in out.report.rows if row.form == "gone"} == set(gone)
    assert Plan.from_json(out.plan.to_json()) == out.plan
    rf.save(out, tmp_path / "small")
    again = rf.load(tmp_path / "small", factory=lambda: made(name, seed=4))
    with torch.no_grad():
        torch.testing.assert_close(again(data[0]), out.model(data[0]), rtol=0, atol=0)
        applied = rf.apply(model, out.plan, data)
        torch.testing.assert_close(applied(data[0]), out.model(data[0]))
        in_place = copy.deepcopy(model)
        assert rf.apply_(in_place, out.plan, data) is in_place
        torch.testing.assert_close(in_place(data[0]), out.model(data[0]))
    assert find_sites(out.model, data[0]).graph.reason is None  # it can be traced and compressed again
    assert not out.model.training


def test_the_last_layer_of_the_next_branch_takes_up_all_of_a_linear_branch() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(x)  # type: ignore[no-any-return]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Linear().eval()
    data = list(torch.randn(512, 10, generator=torch.Generator().manual_seed(1)).split(64))
    session = rf.prepare(model, data, families=[rf.Branches(tried=2)])
    out = session.run(rf.Budget(params=0.6))
    assert [branch.branch for branch in out.plan.branches] == ["first"]
    with torch.no_grad():  # x + A x + B (x + A x) is one linear map of x
        assert float((out.model(data[0]) - model(data[0])).norm() / model(data[0]).norm()) < 5e-3


def test_what_is_left_of_a_branch_is_its_mean() -> None:
    model, data = made("norms behind"), inputs("norms behind", 512)
    out = rf.compress(model, data, budget=rf.Budget(params=0.8), families=[rf.Branches(tried=1)])
    (first, *_) = out.plan.branches
    seen: list[Tensor] = []
    handle = model.get_submodule(first.branch).register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    constant = out.model.get_submodule(first.constant)
    assert isinstance(constant, Constant)
    if len(out.plan.branches) == 1:
        fitted = torch.cat(seen).flatten(0, 1)
        torch.testing.assert_close(constant.bias.detach(), fitted.mean(0), atol=0.02, rtol=0.1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["norms behind", *(pytest.param(n, marks=SLOW) for n in list(NETWORKS)[:3])])
def test_beside_other_families_branches_go_only_where_outputs_come_closer(name: str) -> None:
    model, data = made(name), inputs(name)
    families: list[Any] = [rf.WhitenedSVD(), rf.Branches(tried=1)]
    out = rf.compress(model, data, budget=rf.Budget(params=0.5), families=families)
    plain = rf.compress(model, data, budget=rf.Budget(params=0.5), families=[rf.WhitenedSVD()])
    assert out.report.after.params <= 0.5 * out.report.before.params
    assert not any("dropped" in note for note in out.report.notes)
    assert out.report.comparison.divergence <= plain.report.comparison.divergence * 1.5
    assert Plan.from_json(out.plan.to_json()) == out.plan
    for decision in out.plan.decisions:
        assert decision.gone == any(
            decision.site.startswith(f"{path}.") or decision.site == path for path in out.plan.stands
        )


def test_a_layer_called_in_two_branches_is_in_none() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.body(x)
            return self.head(x + self.body(x))  # type: ignore[no-any-return]

    model, data = Shared().eval(), list(torch.randn(64, 8).split(16))
    with pytest.raises(SiteError, match="residual branches"):
        rf.compress(model, data, budget=rf.Budget(params=0.5), families=[rf.Branches()])


def test_a_branch_that_ends_in_the_code_of_its_block_is_a_skip_with_the_reason() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return self.head(x + 2 * self.second(x).tanh())  # type: ignore[no-any-return]

    model, data = Scaled().eval(), list(torch.randn(64, 8).split(16))
    out = rf.compress(model, data, budget=rf.Budget(params=0.7), families=[rf.Branches()])
    assert [branch.branch for branch in out.plan.branches] == ["first"]
    (skip,) = (skip for skip in out.plan.skips if skip.path == "second")
    assert "does not end in a module of its own" in skip.reason
    with pytest.raises(BudgetError, match=r"smallest|reach"):
        rf.compress(model, data, budget=rf.Budget(params=0.2), families=[rf.Branches()])


def test_excluded_layers_keep_their_branch() -> None:
    model, data = made("norms before"), inputs("norms before")
    out = rf.compress(
        model, data, budget=rf.Budget(params=0.75), families=[rf.Branches()], exclude=["layers.0.*", "layers.1.mlp.0"]
    )
    assert {branch.branch for branch in out.plan.branches} == {"layers.1.attention.out"}


def test_branches_need_a_repair() -> None:
    model, data = made("norms before"), inputs("norms before")
    with pytest.raises(SiteError, match="repair"):
        rf.compress(model, data, budget=rf.Budget(params=0.7), families=[rf.Branches()], repair=None)
    out = rf.compress(model, data, budget=rf.Budget(params=0.7), families=[rf.SVD(), rf.Branches()], repair=None)
    assert not out.plan.branches
    assert any("needs a repair" in note for note in out.report.notes)
    with pytest.raises(OptionError, match="tried"):
        rf.Branches(tried=0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that removes one branch."""
    model, data = made("norms behind"), inputs("norms behind")
    return rf.compress(model, data, budget=rf.Budget(params=0.8), families=[rf.Branches(tried=1)]).plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, repair=None), "repair"),
        (lambda plan: replace(plan, stands={}), "constant"),
        (lambda plan: replace(plan, stands={**plan.stands, "nowhere": next(iter(plan.stands.values()))}), "no such"),
        (lambda plan: replace(plan, decisions=tuple(replace(d, rank=None) for d in plan.decisions)), "rank 0"),
        (lambda plan: replace(plan, branches=(replace(plan.branches[0], branch="head"),)), "residual branch"),
    ],
    ids=["no repair", "no stands", "unknown stand", "no rank 0", "no branch"],
)
def test_a_plan_that_does_not_agree_with_itself_is_refused(plan: Plan, change: Any, message: str) -> None:
    model, data = made("norms behind"), inputs("norms behind")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=message):
        rf.apply_(model, change(plan), data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "stand",
    [{"kind": "zero"}, {"kind": "constant"}, {"kind": "bypass", "channels": 3}, {"kind": "constant", "channels": -1}],
)
def test_a_stand_of_no_kind_is_refused_by_its_place(plan: Plan, stand: dict[str, Any]) -> None:
    text = json.loads(plan.to_json())
    text["stands"][plan.branches[0].constant] = stand
    with pytest.raises(PlanError, match=r"stands\."):
        Plan.from_json(json.dumps(text))


def test_gradients_and_training_mode_are_those_of_the_modules_that_went() -> None:
    model, data = Encoder(before=False).eval(), inputs("norms behind")
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    model.train()
    out = rf.compress(model, data, budget=rf.Budget(params=0.6), families=[rf.Branches(tried=1)])
    assert out.model.training
    for decision in out.plan.branches:
        if decision.constant.startswith("layers.0"):
            assert not out.model.get_parameter(f"{decision.constant}.bias").requires_grad


class Mixed(nn.Module):
    """Blocks under two names; the forward takes the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList([Plain() for _ in range(3)])
        self.again = nn.ModuleList(list(self.layers))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.again:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Plain(nn.Module):
    """One residual branch of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def test_a_block_with_two_names_goes_under_the_first() -> None:
    torch.manual_seed(0)
    model, data = Mixed().eval(), list(torch.randn(96, 6).split(32))
    families = [rf.SVD(), rf.Branches(tried=1)]
    for budget in (rf.Budget(params=0.6), rf.Budget(params=0.35)):
        out = rf.compress(model, data, budget=budget, families=[families[1]])
        gone = {decision.site for decision in out.plan.decisions if decision.gone}
        assert gone
        assert all(path.startswith("layers.") for path in (*gone, *out.plan.stands))
        assert sum(row.form == "gone" for row in out.report.rows) == len(gone)
        assert out.report.after == count(out.model, data[0])
        both = rf.compress(model, data, budget=budget, families=families)
        assert both.report.after.params <= budget.bounds(both.report.before)["params"]
    with pytest.raises(SiteError, match="residual branches"):
        rf.compress(model, data, budget=rf.Budget(params=0.6), families=[families[1]], exclude=["layers.*"])


def test_channels_and_ranks_and_branches_share_one_budget() -> None:
    model, data = made("convolutions"), inputs("convolutions")
    families = [rf.Branches(tried=1), rf.WhitenedSVD(), rf.Interpolative()]
    out = rf.compress(model, data, budget=rf.Budget(params=0.4), families=families)
    assert out.report.after == count(out.model, data[0])
    assert out.report.after.params <= 0.4 * out.report.before.params
    assert not any("dropped" in note for note in out.report.notes)


def test_a_branch_named_twice_and_a_stand_beside_the_branches_are_refused(plan: Plan) -> None:
    model, data = made("norms behind"), inputs("norms behind")
    with pytest.raises(PlanError, match="named twice"):
        rf.apply(model, replace(plan, branches=plan.branches * 2), data)
    extra = {**plan.stands, "layers.1.norm2": Stand("bypass")}
    with pytest.raises(PlanError, match="and of nothing else"):
        rf.apply(model, replace(plan, stands=extra), data)

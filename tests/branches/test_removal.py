"""Branches that go: what only fed them leaves the module tree, and the layers after them take up what they did."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.branching import LAST, NETWORKS, Encoder, inputs, made
from torch import Tensor, nn

import rankfold as rf
from rankfold.branches.finding import BranchError, find_branches, first_names
from rankfold.branches.installing import install_stands_
from rankfold.branches.trial import stands_of
from rankfold.cost.counted import count
from rankfold.errors import BudgetError, OptionError, PlanError, SiteError
from rankfold.layers.stands import Bypass, Constant, Stand
from rankfold.plan import Plan
from rankfold.sites.finding import find_sites

REFUSED = "in place", "blocks.1.conv2"  # adds a projection of another width in place


def _zeroed(model: nn.Module, name: str) -> nn.Module:
    """A copy whose branch puts out zeros, by hand."""
    result = copy.deepcopy(model)
    last = result.get_submodule(name)
    owner, _, own = name.rpartition(".")
    if own == "conv2":
        last = result.get_submodule(f"{owner}.bn2")
        last.running_mean.zero_()  # type: ignore[operator, union-attr]
        result.get_submodule(name).weight.data.zero_()  # type: ignore[union-attr, operator]
    else:
        last.weight.data.zero_()  # type: ignore[union-attr, operator]
    last.bias.data.zero_()  # type: ignore[union-attr, operator]
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_every_branch_is_found_by_its_last_layer(name: str) -> None:
    model = made(name)
    program = find_sites(model, inputs(name)[0]).graph.program
    assert program is not None
    assert [branch.name for branch in find_branches(program, first_names(model))] == LAST[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_without_a_branch_is_the_model_whose_branch_puts_out_zeros(name: str) -> None:
    model, data = made(name), inputs(name)
    graph = find_sites(model, data[0]).graph
    assert graph.program is not None
    for branch in find_branches(graph.program, first_names(model)):
        if (name, branch.name) == REFUSED:
            continue
        stands = stands_of(model, graph, [branch], data[0])
        small = install_stands_(copy.deepcopy(model), {path: stand for path, (_, stand) in stands.items()})
        with torch.no_grad():
            torch.testing.assert_close(small(data[0]), _zeroed(model, branch.name)(data[0]), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert not hasattr(dict(small.named_modules()).get(branch.name), "weight")


def test_a_block_that_is_left_with_nothing_to_do_goes_whole() -> None:
    for name, branches, whole in (
        ("convolutions", ["blocks.2.conv2"], {"blocks.2"}),
        ("in place", ["blocks.0.conv2"], {"blocks.0"}),
        ("norms before", ["layers.1.attention.out", "layers.1.mlp.2"], {"layers.1"}),
    ):
        model, data = made(name), inputs(name)
        graph = find_sites(model, data[0]).graph
        assert graph.program is not None
        gone = [branch for branch in find_branches(graph.program, first_names(model)) if branch.name in branches]
        stands = stands_of(model, graph, gone, data[0])
        assert set(stands) == whole
        assert {stand.kind for _, stand in stands.values()} == {"bypass"}


def test_code_that_adds_in_place_gets_a_constant_as_large_as_its_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(torch.tanh(self.first(x)))
            y += x
            return torch.tanh(y)

    model, data = InPlace().eval(), torch.randn(4, 3, 5, 5)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    stands = stands_of(model, graph, [branch], data)
    assert stands["second"][1].full
    small = install_stands_(model, {path: stand for path, (_, stand) in stands.items()})
    with torch.no_grad():
        torch.testing.assert_close(small(data), torch.tanh(data))


def test_a_branch_that_must_be_added_in_place_to_another_width_stays() -> None:
    model, data = made(REFUSED[0]), inputs(REFUSED[0])
    graph = find_sites(model, data[0]).graph
    assert graph.program is not None
    with pytest.raises(BranchError, match="expanded size"):
        stands_of(
            model,
            graph,
            [branch for branch in find_branches(graph.program, first_names(model)) if branch.name == REFUSED[1]],
            data[0],
        )


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


def test_a_branch_whose_sum_broadcasts_is_none() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.head = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.wide(x)
            return self.head(x + self.narrow(x))  # type: ignore[no-any-return]

    model = Broadcast().eval()
    program = find_sites(model, torch.randn(4, 8)).graph.program
    assert program is not None
    assert [branch.name for branch in find_branches(program, first_names(model))] == ["wide"]


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


def test_code_that_writes_into_what_a_bypass_hands_on_leaves_the_skip_alone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.mix = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.nn.functional.hardtanh(self.up(x), -2.0, 2.0, inplace=True)
            return torch.tanh(self.mix(x + self.down(h)))

    torch.manual_seed(0)
    model, data = Writes().eval(), torch.randn(8, 8)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    stands = stands_of(model, graph, [branch], data)
    small = install_stands_(copy.deepcopy(model), {path: stand for path, (_, stand) in stands.items()})
    with torch.no_grad():
        torch.testing.assert_close(small(10 * data), torch.tanh(model.mix(10 * data)))


def test_channels_that_lie_on_another_axis_than_the_last_layers_leave_no_constant() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x.movedim(1, -1)))).movedim(-1, 1)  # type: ignore[no-any-return]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Turned()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.branch(x))

    model, data = Block().eval(), torch.randn(4, 8, 8, 8)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    with pytest.raises(BranchError, match="channels"):
        stands_of(model, graph, [branch], data)


def test_a_branch_named_twice_and_a_stand_beside_the_branches_are_refused(plan: Plan) -> None:
    model, data = made("norms behind"), inputs("norms behind")
    with pytest.raises(PlanError, match="named twice"):
        rf.apply(model, replace(plan, branches=plan.branches * 2), data)
    extra = {**plan.stands, "layers.1.norm2": Stand("bypass")}
    with pytest.raises(PlanError, match="and of nothing else"):
        rf.apply(model, replace(plan, stands=extra), data)

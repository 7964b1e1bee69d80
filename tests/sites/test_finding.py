"""What `find_sites` finds, and that it leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.errors import OptionError, SiteError, TraceError
from rankfold.layers import PivotedLayer
from rankfold.sites.finding import fingerprint
from rankfold.sites.site import Sites
from rankfold.testing import toy_network


class Shared(nn.Module):
    """One layer under three names, called three times, twice on two tokens and once on one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.listed = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.stack([x, x], 1)
        y = self.listed[0](self.first(pair))
        return self.again(y.mean(1))  # type: ignore[no-any-return]


class Keywords(nn.Module):
    """Takes two named tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, *, left: Tensor, right: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.left(left) + gain * self.right(right)}


class Branching(nn.Module):
    """Control flow that depends on the data, which does not export."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.fc(y) if float(y.detach().sum()) > -1e9 else y


def _found(model: nn.Module, example: Any, **options: Any) -> Sites:
    return rf.find_sites(model, example, **options)


def test_layers_of_every_kind_are_found_with_their_geometry_and_macs() -> None:
    parts = [
        (nn.Conv1d(4, 8, 3, stride=2, padding=1, bias=False), (4, 9), 8 * 4 * 3 * 5),
        (nn.Conv2d(4, 8, (3, 5), padding="same", padding_mode="circular"), (4, 7, 6), 8 * 4 * 15 * 42),
        (nn.Conv2d(8, 12, 3, groups=2, dilation=2), (8, 9, 8), 12 * 4 * 9 * 5 * 4),
        (nn.Conv3d(2, 6, 3), (2, 5, 5, 4), 6 * 2 * 27 * 3 * 3 * 2),
        (nn.Linear(10, 6), (7, 10), 7 * 10 * 6),
    ]
    for layer, size, macs in parts:
        (site,) = _found(nn.Sequential(layer), torch.randn(2, *size))
        assert site.path == "0"
        assert site.weight_shape == tuple(layer.weight.shape)
        assert site.macs == macs == count(nn.Sequential(layer), torch.randn(2, *size)).macs


def test_a_model_that_is_one_layer_is_a_site_with_an_empty_path() -> None:
    (site,) = _found(nn.Linear(8, 8), torch.randn(2, 8))
    assert site.path == ""
    out = rf.compress(nn.Linear(8, 8), [torch.randn(20, 8)], budget=rf.Budget(params=0.8))
    assert isinstance(out.model, PivotedLayer)


def test_conv1d_of_transformers_is_a_site() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.pytorch_utils import Conv1D

    (site,) = _found(nn.Sequential(Conv1D(12, 8)), torch.randn(2, 5, 8))
    assert site.weight_shape == (12, 8)
    assert site.macs == 5 * 12 * 8


def test_a_shared_layer_is_one_site_with_all_its_paths_and_calls() -> None:
    (site,) = _found(Shared(), torch.randn(3, 8))
    assert site.path == "first"
    assert site.aliases == ("again", "listed.0")
    assert [applied for _, applied in site.calls] == [2, 2, 1]
    assert site.macs == 5 * 64


def test_a_shared_layer_is_replaced_under_every_path_and_counted_once() -> None:
    model, x = Shared(), torch.randn(20, 8)
    out = rf.compress(model, [x], budget=rf.Budget(params=0.6), families=[rf.SVD()], repair=None)
    small = out.model
    assert isinstance(small.first, nn.Sequential)
    assert small.first is small.again is small.listed[0]
    rank = small.first[0].out_features
    cost = count(small, x)
    assert cost.params == 16 * rank + 8
    assert cost.macs == 5 * 16 * rank
    assert cost == rf.plan_cost(_found(model, x), out.plan)


def test_a_tensor_a_tuple_and_a_dict_are_all_examples() -> None:
    x = torch.randn(3, 8)
    model = nn.Sequential(nn.Linear(8, 8))
    for example in (x, (x, torch.zeros(3)), [x]):
        assert len(_found(model, example)) == 1
    found = _found(Keywords(), {"left": torch.randn(3, 6), "right": torch.randn(3, 4), "gain": 2.0})
    assert [site.path for site in found] == ["left", "right"]
    assert found.graph.program is not None


def test_a_positional_dict_inside_a_tuple_is_keywords_too() -> None:
    batch = ({"left": torch.randn(3, 6), "right": torch.randn(3, 4)}, torch.zeros(3))
    assert len(_found(Keywords(), batch)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_every_module_keeps_its_own_mode(training: bool) -> None:
    model, x = toy_network()
    model.train(training)
    model[1].train(not training)
    modes = [module.training for module in model.modules()]
    running = model[1].running_mean.clone()
    _found(model, x)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, running)


def test_the_model_is_left_as_it_was() -> None:
    model, x = toy_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    state = torch.random.get_rng_state()
    with torch.no_grad():
        expected = model(x)
    _found(model, x)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 8)).train()
    modules = dict(model.named_modules())
    with pytest.raises(
        TraceError, match=r"Sequential · the model runs on a batch of the data · got .* inputs"
    ) as error:
        _found(model, torch.randn(2, 8))
    assert "(2, 8)" in error.value.got
    assert dict(model.named_modules()) == modules
    assert model.training


def test_training_layers_are_traced_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    program = _found(model, torch.randn(4, 8)).graph.program
    assert program is not None
    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=0, atol=0)


def test_control_flow_on_data_takes_the_hook_road_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    found = _found(Branching(), torch.randn(4, 8))
    assert capfd.readouterr() == ("", "")
    assert found.graph.program is None
    assert found.graph.reason is not None
    assert found.graph.reason.startswith("torch.export failed (")
    assert [site.path for site in found] == ["fc"]
    assert found[0].macs == 2 * 64


def test_the_hook_road_compresses_and_the_report_says_so() -> None:
    model, x = Branching(), torch.randn(40, 8)
    out = rf.compress(model, [x], budget=rf.Budget(params=0.6))
    assert isinstance(out.model.fc, PivotedLayer)
    assert count(out.model, x) == rf.plan_cost(_found(model, x), out.plan)
    assert any(note.startswith("no graph, module hooks were used") for note in out.report.notes)
    assert "note: no graph, module hooks were used" in str(out.report)


def test_sites_are_a_sequence_found_by_path_or_alias() -> None:
    found = _found(Shared(), torch.randn(3, 8))
    assert len(found) == 1
    assert found[0] is found.at("first") is found.at("again") is next(iter(found))
    assert list(found[0:1]) == [found[0]]


def test_an_unknown_site_names_near_matches_and_a_skip_its_reason() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(8, 8))
    model.add_module("table", nn.Bilinear(8, 8, 8))
    model.forward = lambda x: model.table(model.encoder(x), x)  # type: ignore[method-assign]
    found = _found(model, torch.randn(2, 8))
    with pytest.raises(
        SiteError, match=r"'encodr' · the path of a site · got an unknown path · did you mean 'encoder'"
    ):
        found.at("encodr")
    with pytest.raises(SiteError, match="got a skipped layer \\(unsupported: no adapter for layers of kind Bilinear"):
        found.at("table")


class Deep(nn.Module):
    """Two blocks of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block["down"](block["up"](x).relu())  # type: ignore[index]
        return self.head(x)  # type: ignore[no-any-return]


def test_a_selection_takes_paths_and_patterns() -> None:
    model, x = Deep(), torch.randn(2, 8)
    found = _found(model, x, only=["block.*.up", "head"], exclude=["block.1.*"])
    assert [site.path for site in found] == ["block.0.up", "head"]
    reasons = {skip.path: skip.reason for skip in found.skips}
    assert reasons["block.0.down"] == "not selected: it is not among `only`"
    assert reasons["block.1.up"] == "not selected: it is among `exclude`"
    assert reasons["spare"].startswith("not called")


def test_a_selection_keeps_the_cost_of_the_whole_model() -> None:
    model, x = Deep(), torch.randn(2, 8)
    assert _found(model, x, only=["head"]).cost == _found(model, x).cost


def test_an_unknown_path_in_a_selection_names_near_matches() -> None:
    model, x = Deep(), torch.randn(2, 8)
    with pytest.raises(
        SiteError, match=r"'block.0.upp' · a selection names layers.* · got no match · did you mean 'bl"
    ):
        _found(model, x, only=["block.0.upp"])
    with pytest.raises(SiteError, match=r"'heads' .* did you mean 'head'\?"):
        _found(model, x, exclude=["heads"])


def test_a_container_in_a_selection_names_the_pattern_below_it() -> None:
    with pytest.raises(SiteError, match=r"'block.0' .* for all below it: 'block.0.\*'"):
        _found(Deep(), torch.randn(2, 8), only=["block.0"])


def test_a_skipped_layer_in_only_is_refused_with_its_reason() -> None:
    with pytest.raises(SiteError, match=r"'spare' .* got a skipped layer \(not called"):
        _found(Deep(), torch.randn(2, 8), only=["spare"])
    assert len(_found(Deep(), torch.randn(2, 8), exclude=["spare"])) == 5


@pytest.mark.parametrize("name", ["only", "exclude"])
def test_a_bare_string_is_no_selection(name: str) -> None:
    with pytest.raises(
        OptionError, match=rf"{name} · a list of paths or patterns · got 'head' · try {name}=\['head'\]"
    ):
        _found(Deep(), torch.randn(2, 8), **{name: "head"})


def test_the_fingerprint_is_of_the_structure_and_not_of_the_numbers() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(nn.Linear(8, 8, bias=False))
    assert fingerprint(first) != fingerprint(nn.Linear(8, 9))
    assert fingerprint(first) != fingerprint(nn.Linear(8, 8).half())

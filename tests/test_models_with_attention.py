"""Models that hold `nn.MultiheadAttention`, from the user's model to the user's factory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.errors import PlanError
from rankfold.layers.attention import SplitAttention

pytestmark = [  # torch's own, where it packs what is padded, or cannot
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
WIDTH, LENGTH, SAMPLES = 16, 6, 40


class Classifier(nn.Module):
    """Tokens → encoder → logits of their mean; also the padded ones, as a user may have forgotten."""

    def __init__(self, *, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.causal = options.get("batch_first", True), causal
        self.embedding = nn.Linear(8, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, **{"batch_first": True, **options})
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        h = self.embedding(x)
        h = h if self.first else h.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if self.causal else None
        h = self.encoder(h, mask=mask, src_key_padding_mask=padding)
        y: Tensor = self.head((h if self.first else h.transpose(0, 1)).mean(1))
        return y


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, 4, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y: Tensor = self.head(self.body(source, target, tgt_mask=mask))
        return y


class Other(nn.Module):
    """Keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=12, vdim=20, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x, key, value)[0])
        return y


class Shared(nn.Module):
    """One attention in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.again, self.head = nn.ModuleList([self.attention]), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.head(h + self.again[0](h, h, h, need_weights=False)[0])
        return y


def _alone() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


def _inputs(**widths: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(SAMPLES, LENGTH, width) for name, width in widths.items()}


def _padded(**widths: int) -> dict[str, Tensor]:
    padding = torch.arange(LENGTH) >= LENGTH - torch.arange(SAMPLES)[:, None] % 4
    return {**_inputs(**widths), "padding": padding}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "padding": (Classifier, lambda: _padded(x=8)),
    "norm first, no bias": (lambda: Classifier(norm_first=True, bias=False), lambda: _inputs(x=8)),
    "causal, sequence first": (lambda: Classifier(causal=True, batch_first=False), lambda: _inputs(x=8)),
    "translator": (Translator, lambda: _inputs(source=WIDTH, target=WIDTH)),
    "alone": (_alone, lambda: {**_inputs(query=WIDTH, key=WIDTH, value=WIDTH), "need_weights": False}),
    "other keys and values": (Other, lambda: _inputs(x=WIDTH, key=12, value=20)),
    "shared": (Shared, lambda: _inputs(x=WIDTH)),
}


QUICK = ("alone", "other keys and values", "shared")


def _made(kind: str) -> tuple[nn.Module, Any, Callable[[], nn.Module]]:
    build, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model, inputs(), build


def _output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        got = model(**batch)
    y: Tensor = got[0] if isinstance(got, tuple) else got
    return y


def _compress(model: nn.Module, data: Any, **options: Any) -> rf.Compressed:
    return rf.compress(model, data, budget=rf.Budget(params=0.5), selector=rf.Uniform(), **options)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in MODELS]
)
def test_it_is_compressed_to_a_half_saved_and_loaded_by_the_users_own_factory(kind: str, tmp_path: Path) -> None:
    model, batch, build = _made(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    expected = _output(model, batch)
    sites = rf.find_sites(model, batch)
    assert sites.graph.reason is None
    assert sites.cost == count(model, batch)
    assert {path.rpartition(".")[2] for path in (site.path for site in sites)} >= {"q", "k", "v", "out"}
    out = _compress(model, [batch])
    assert out.report.after.params <= 0.5 * sum(p.numel() for p in model.parameters())
    assert any(note.startswith("self-check") for note in out.report.details)
    assert out.plan.split == sites.split
    # the original
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(_output(model, batch), expected)
    # the result, from a file
    got = _output(out.model, batch)
    rf.save(out, tmp_path / "small")
    torch.manual_seed(3)
    assert torch.equal(_output(rf.load(tmp_path / "small", factory=build), batch), got)
    loaded = rf.load(tmp_path / "small", factory=lambda: rf.split_attention(build()))
    assert torch.equal(_output(loaded, batch), got)
    # its plan, from its text
    plan = rf.Plan.from_json(out.plan.to_json())
    assert plan == out.plan
    assert torch.equal(_output(rf.apply(model, plan, [batch]), batch), got)
    assert torch.equal(_output(rf.execute(model, [batch], plan).model, batch), got)
    again = copy.deepcopy(model)
    changed = rf.apply_(again, plan, [batch])
    assert (changed is again) == (kind != "alone")
    assert torch.equal(_output(changed, batch), got)


@pytest.mark.parametrize("kind", MODELS)
def test_all_its_layers_are_sites_and_its_smallest_size_is_far_below_a_half(kind: str) -> None:
    model, batch, _ = _made(kind)
    session = rf.prepare(model, [batch], weighting=False)
    assert [skip for skip in session.sites.skips if "norm" not in skip.path] == []
    paths = {site.path for site in session.sites}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not path.startswith("again"):
            assert {f"{path}.{part}".lstrip(".") for part in ("q", "k", "v", "out")} <= paths
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            assert {f"{path}.linear1", f"{path}.linear2"} <= paths
    assert session.original is model
    assert session.forecast(rf.Budget(params=0.5)).smallest["params"] < 0.25 * session.sites.cost.params


@pytest.mark.slow
def test_encoder_and_decoder_layers_lose_heads() -> None:
    model, batch, build = _made("translator")
    out = rf.compress(model, [batch], budget=rf.Budget(params=0.6), families=[rf.Interpolative()])
    lost = {each.group: len(each.kept) for each in out.plan.channels if each.units == 4}
    assert lost
    for group, kept in lost.items():
        attention = out.model.get_submodule(group.removesuffix(".q"))
        assert isinstance(attention, SplitAttention)
        assert attention.num_heads == kept < 4
    rebuilt = rf.apply(build(), out.plan, [batch])
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in out.model.parameters()]


def test_step_by_step_all_functions_take_the_users_own_model() -> None:
    model, batch, _ = _made("shared")
    sites = rf.find_sites(model, batch)
    assert [group.name for group in rf.find_channels(model, sites)] == ["attention.q"]
    stats = rf.collect(model, [batch], sites=sites, statistics=rf.WhitenedSVD().needs)
    curves = rf.measure(model, stats, sites=sites, families=[rf.WhitenedSVD()])
    plan = rf.make_plan(curves, budget=rf.Budget(params=0.5))
    assert plan.split == ("attention",)
    small = rf.apply(model, plan, stats=stats)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sites.cost.params
    assert isinstance(small.attention, SplitAttention)
    assert small.attention is small.again[0]  # type: ignore[index]
    merged = rf.merge(small, plan)
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(_output(merged, batch), _output(small, batch))


def _planned(model: nn.Module, batch: Any, params: float = 0.5) -> rf.Plan:
    sites = rf.find_sites(model, batch)
    curves = rf.measure(model, None, sites=sites, families=[rf.SVD()])
    return rf.make_plan(curves, budget=rf.Budget(params=params))


def test_a_plan_names_what_it_splits_and_one_that_splits_nothing_reads_as_before() -> None:
    model, batch, _ = _made("shared")
    plan = _planned(model, batch)
    assert rf.Plan.from_json(plan.to_json()) == plan
    assert '"split": [\n  "attention"\n ]' in plan.to_json()
    plain = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    assert "split" not in _planned(plain, torch.randn(4, 12)).to_json()


def test_a_plan_that_splits_nothing_leaves_attention_whole() -> None:
    model, batch, _ = _made("shared")
    left = model.attention
    assert isinstance(left, nn.Module)
    handle = left.register_forward_hook(lambda *_: None)
    plan = _planned(model, batch, 0.98)
    handle.remove()
    assert plan.split == ()
    small = rf.apply(model, plan)
    assert type(small.attention) is nn.MultiheadAttention
    out = rf.execute(model, [batch], plan)
    assert type(out.model.attention) is nn.MultiheadAttention
    assert out.plan.split == ()


def test_a_plan_of_split_attention_is_refused_where_it_cannot_be_split() -> None:
    model, batch, _ = _made("shared")
    plan = _planned(model, batch)
    modules = list(model.modules())
    for path, got in (("attentoin", "no such module"), ("head", "Linear")):
        with pytest.raises(PlanError, match=f"'{path}'.*every attention.*{got}"):
            rf.apply(model, replace(plan, split=(path,)))
    with pytest.raises(PlanError, match=r"fingerprint"):
        rf.apply(model, replace(plan, split=()))
    model.attention.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    for carry_out in (rf.apply, rf.apply_):
        with pytest.raises(PlanError, match="hooked"):
            carry_out(model, plan)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    with pytest.raises(PlanError, match=r"plan\.split"):
        rf.Plan.from_json(plan.to_json().replace('"split": [\n  "attention"\n ]', '"split": "attention"'))


def test_a_plan_that_fails_in_place_leaves_attention_whole() -> None:
    model, batch, _ = _made("shared")
    plan, modules = _planned(model, batch), list(model.modules())
    expected = _output(model, batch)
    (first, *_) = plan.changes
    with pytest.raises(PlanError):
        rf.apply_(model, plan.with_decision(replace(first, rank=999)))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(_output(model, batch), expected)
    assert rf.apply_(model, plan) is model
    assert isinstance(model.attention, SplitAttention)


def test_a_factory_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model, batch, _ = _made("shared")
    rf.save(rf.execute(model, [batch], _planned(model, batch)), tmp_path / "small")
    with pytest.raises(PlanError, match=r"'attention'.*no such module"):
        rf.load(tmp_path / "small", factory=lambda: nn.Linear(3, 3))


def test_a_compiled_model_is_split_inside_and_refused_in_place() -> None:
    model, batch, _ = _made("shared")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert rf.find_sites(compiled, batch).split == ("attention",)
    with pytest.raises(rf.RankfoldError, match="not compiled"):
        rf.apply_(compiled, _planned(model, batch))

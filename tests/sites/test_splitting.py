"""Which attention is split: that whose split changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.layers.attention import SplitAttention
from rankfold.sites.splitting import split_where_same
from rankfold.testing.devices import generator_states, same_states

X = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Two attention modules, of which some code does something with the second."""

    def __init__(self, code: Callable[[nn.MultiheadAttention, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))
        self.code, self.head = code, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x, x, x, need_weights=False)[0]
        y: Tensor = self.head(self.code(self.two, x))
        return y


def _plain(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x, x, x)[0]


def _weights(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    h, weights = attention(x, x, x)
    return h + weights.mean()  # type: ignore[no-any-return]


def _weights_if_any(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    h, weights = attention(x, x, x)
    return h if weights is None else h + weights.mean()


def _parameters(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return attention(x.to(attention.in_proj_weight.dtype), x, x)[0] + attention.out_proj.weight.mean()


def _functional(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return nn.functional.linear(x, attention.in_proj_weight[:12])


FAULTS = {
    _weights: "the model fails (AttributeError: 'NoneType' object has no attribute 'mean')",
    _weights_if_any: "the model computes something else",
    _parameters: "the model fails (AttributeError: 'SplitAttention' object has no attribute 'in_proj_weight')",
    _functional: "the model fails (AttributeError: 'SplitAttention' object has no attribute 'in_proj_weight')",
}


@pytest.mark.parametrize("code", FAULTS, ids=lambda code: code.__name__)
def test_attention_of_which_something_else_is_read_stays_whole_and_the_others_are_split(
    code: Callable[[nn.MultiheadAttention, Tensor], Tensor],
) -> None:
    model = Reads(code).eval()
    split = split_where_same(model, X)
    assert split.paths == ("one",)
    assert split.whole == {"two": f"read elsewhere: with it split into linear layers {FAULTS[code]}"}
    found = rf.find_sites(model, X)
    assert {site.path for site in found} == {"one.q", "one.k", "one.v", "one.out", "head"}
    assert {skip.path: skip.reason for skip in found.skips}["two"] == split.whole["two"]
    out = rf.compress(model, [X], budget=rf.Budget(params=0.8), selector=rf.Uniform(), repair=None, weighting=False)
    assert type(out.model.two) is nn.MultiheadAttention
    assert torch.isfinite(out.model(X)).all()


@dataclass
class Answer:
    logits: Tensor
    attention: Tensor | None


def test_weights_of_attention_in_any_output_keep_it_whole() -> None:
    class Told(nn.Module):
        def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention, self.wrap = nn.MultiheadAttention(12, 3, batch_first=True), wrap

        def forward(self, x: Tensor) -> object:
            return self.wrap(*self.attention(x, x, x))

    for wrap in (Answer, lambda h, w: (h, w), lambda h, w: {"h": h, "more": [w]}):
        assert split_where_same(Told(wrap).eval(), X).paths == ()
    split = split_where_same(Told(lambda h, _: Answer(h, None)).eval(), X)
    assert split.paths == ("attention",)


def test_a_model_without_attention_is_the_very_same() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    split = split_where_same(model, X)
    assert split.model is model
    assert (split.paths, split.whole) == ((), {})


def test_all_other_tensors_are_shared_and_nothing_is_drawn_or_left_behind() -> None:
    model = Reads(_plain).train()
    before, hooks = generator_states(), [len(module._forward_pre_hooks) for module in model.modules()]
    split = split_where_same(model, X)
    assert same_states(before, generator_states())
    assert split.paths == ("one", "two")
    assert split.model.head.weight is model.head.weight  # type: ignore[union-attr]
    assert split.model.one.training
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in split.model.modules())


def test_attention_that_the_forward_does_not_reach_stays_whole() -> None:
    def unused(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return x

    split = split_where_same(Reads(unused).eval(), X)
    assert split.paths == ("one",)
    assert split.whole == {"two": "not called: the forward on the example does not reach it"}


def test_subclasses_and_layers_with_a_forward_of_their_own_stay_whole() -> None:
    class Own(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *_: object, **__: object) -> Tensor:  # type: ignore[override]
            return self.norm1(src + self._sa_block(src, None, None))  # type: ignore[no-any-return]

    class Inherits(nn.TransformerEncoderLayer):
        pass

    model = nn.Sequential(Layer(12, 3, 24), Inherits(12, 3, 24)).eval()
    model[0].linear1 = Own(12, 3)  # type: ignore[assignment]
    split = split_where_same(model, X)
    assert split.paths == ("1.self_attn",)
    assert {path: why.partition(":")[0] for path, why in split.whole.items()} == {
        "0.self_attn": "read elsewhere",
        "0.linear1": "unsupported",
    }


def test_a_model_that_draws_and_one_that_fixes_its_batch_size_are_split() -> None:
    def drawing(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return attention(x, x, x)[0] + torch.rand_like(x)

    def fixed(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        return attention(x, x, x)[0].view(40, 5, 12)

    assert split_where_same(Reads(drawing).eval(), X).paths == ("one", "two")
    assert split_where_same(Reads(fixed).eval(), X[:1].expand(40, 5, 12)).paths == ("one", "two")


def test_a_model_that_needs_autocast_keeps_its_attention_whole() -> None:
    def needs(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        return attention(x, x, x)[0].float()

    model = Reads(needs).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        split = split_where_same(model, X)
    assert split.model is model
    assert {why.partition(":")[0] for why in split.whole.values()} == {"not tried"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = Reads(_plain).eval().to(dtype)
    split = split_where_same(model, X.to(dtype))
    assert split.paths == ("one", "two")
    assert split.model.one.q.weight.dtype == dtype  # type: ignore[union-attr]
    assert split_where_same(Reads(_weights_if_any).eval().to(dtype), X.to(dtype)).paths == ("one",)


def test_a_copy_that_calls_the_original_is_not_split() -> None:
    model = Reads(_plain).eval()
    model.code = lambda attention, x: _plain(attention, model.head.weight.sum() + model.mirror(x))
    model.mirror = nn.Linear(12, 12)
    split = split_where_same(model, X)
    assert split.model is model
    assert all("still calls 'mirror' of the model itself" in why for why in split.whole.values())


def test_what_is_frozen_stays_frozen() -> None:
    model = Reads(_plain).eval()
    model.one.requires_grad_(requires_grad=False)
    model.two.out_proj.requires_grad_(requires_grad=False)
    split = split_where_same(model, X).model
    assert isinstance(split.two, SplitAttention)
    frozen = {name for name, parameter in split.named_parameters() if not parameter.requires_grad}
    parts = {f"one.{part}.{name}" for part in ("q", "k", "v", "out") for name in ("weight", "bias")}
    assert frozen == parts | {"two.out.weight", "two.out.bias"}

"""`nn.MultiheadAttention` taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rankfold as rf
from rankfold.errors import ModelError
from rankfold.layers.attention import SplitAttention
from rankfold.layers.splitting import attentions, joined, split_, split_at
from rankfold.testing.devices import generator_states, same_states

KINDS: dict[str, Callable[[], nn.MultiheadAttention]] = {
    "packed": lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    "no bias": lambda: nn.MultiheadAttention(12, 3, bias=False, batch_first=True),
    "sequence first": lambda: nn.MultiheadAttention(12, 4),
    "other keys and values": lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=5, batch_first=True),
}
FLOATS, BOOLS = torch.randn(6, 6), torch.ones(6, 6, dtype=torch.bool).triu(1)
PADDING = torch.zeros(2, 6, dtype=torch.bool)
PADDING[1, 4:] = True
MASKS: dict[str, dict[str, Tensor | bool]] = {
    "none": {},
    "added": {"attn_mask": FLOATS},
    "forbidden": {"attn_mask": BOOLS},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": BOOLS, "key_padding_mask": PADDING},
    "causal": {"attn_mask": BOOLS, "is_causal": True},
}


def _made(kind: str) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = KINDS[kind]()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(kind: str, mask: str) -> None:
    module = _made(kind)
    inputs = [torch.randn(2, 6, width) for width in (12, module.kdim, module.vdim)]
    if not module.batch_first:
        inputs = [each.transpose(0, 1) for each in inputs]
    with torch.no_grad():
        expected, _ = module(*inputs, need_weights=False, **MASKS[mask])
        got, weights = SplitAttention(module)(*inputs, **MASKS[mask])
    torch.testing.assert_close(got, expected)
    assert weights is None


def test_a_mask_of_each_head_and_one_sample_without_a_batch() -> None:
    module, x = _made("packed"), torch.randn(2, 6, 12)
    by_head = torch.randn(6, 6, 6)
    with torch.no_grad():
        for inputs, mask in ((x, by_head), (x[0], None), (x[0], FLOATS)):
            expected, _ = module(inputs, inputs, inputs, need_weights=False, attn_mask=mask)
            got, _ = SplitAttention(module)(inputs, inputs, inputs, attn_mask=mask)
            torch.testing.assert_close(got, expected)


class Block(nn.Module):
    """As in torchvision's vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h, _ = self.attention(h, h, h, need_weights=False)
        y: Tensor = self.head((x + h).mean(1))
        return y


def test_a_split_model_loses_heads() -> None:
    torch.manual_seed(0)
    model, data = Block().eval(), [torch.randn(60, 6, 12)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = rf.compress(nn.Sequential(model, nn.Linear(5, 40), nn.Linear(40, 5)), data, budget=rf.Budget(params=0.9))
    assert whole.report.after.params <= 0.9 * whole.report.before.params
    split = rf.split_attention(model)
    groups = [[group.name for group in rf.find_channels(each, rf.find_sites(each, data[0]))] for each in (model, split)]
    assert groups == [["attention.q"], ["attention.q"]]
    with torch.no_grad():
        torch.testing.assert_close(split(data[0]), model(data[0]))
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    out = rf.compress(split, data, budget=rf.Budget(params=0.7), families=[rf.Interpolative()])
    (group,) = out.plan.channels
    assert (group.group, group.units) == ("attention.q", 4)
    assert out.model.attention.num_heads == len(group.kept) < 4
    assert any(note.startswith("self-check") for note in out.report.details)


def test_what_may_compute_something_else_stays_and_keys_of_its_own_are_refused() -> None:
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            return super().forward(*args, **options)

    layer = Layer(12, 3, 24, batch_first=True).eval()
    assert isinstance(rf.split_attention(nn.Sequential(layer))[0].self_attn, nn.MultiheadAttention)
    assert isinstance(rf.split_attention(_made("packed")), SplitAttention)

    class Own(nn.MultiheadAttention):
        pass

    assert type(rf.split_attention(nn.Sequential(Own(12, 3)))[0]) is Own
    pair = nn.ModuleDict({"one": _made("packed")})
    pair["other"], pair["deeper"] = pair["one"], nn.Sequential(pair["one"])
    shared = rf.split_attention(pair)
    assert shared["one"] is shared["other"] is shared["deeper"][0]
    with pytest.raises(ModelError, match=r"an nn\.Module"):
        rf.split_attention(3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="keys and values come from the inputs alone"):
        rf.split_attention(nn.Sequential(nn.MultiheadAttention(12, 3, add_bias_kv=True)))


def test_splitting_draws_nothing() -> None:
    model = nn.Sequential(_made("packed"))
    before = generator_states()
    rf.split_attention(model)
    assert same_states(before, generator_states())


@pytest.mark.parametrize("kind", ["packed", "other keys and values"])
@pytest.mark.parametrize("frozen", ["weights", "biases", "output"])
def test_what_is_frozen_stays_frozen(kind: str, frozen: str) -> None:
    module = _made(kind)
    for name, parameter in module.named_parameters():
        hit = {"weights": "weight" in name, "biases": "bias" in name, "output": name.startswith("out_proj")}[frozen]
        parameter.requires_grad_(not hit)
    split = SplitAttention(module)
    got = {name for name, parameter in split.named_parameters() if not parameter.requires_grad}
    parts = {"q", "k", "v", "out"}
    assert (
        got
        == {
            "weights": {f"{part}.weight" for part in parts},
            "biases": {f"{part}.bias" for part in parts},
            "output": {"out.weight", "out.bias"},
        }[frozen]
    )


def test_in_training_it_drops_weights_of_attention_as_the_original_does() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True).train()
    split, x = SplitAttention(module), torch.randn(2, 6, 12)
    got = []
    for each in (module, split):
        torch.manual_seed(1)
        got.append(each(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(got[1], got[0])
    assert not torch.equal(split(x, x, x)[0], split(x, x, x)[0])
    assert torch.equal(split.eval()(x, x, x)[0], split(x, x, x)[0])


def test_a_hint_alone_masks_nothing() -> None:
    module, x = _made("packed"), torch.randn(2, 6, 12)
    split = SplitAttention(module)
    torch.testing.assert_close(split(x, x, x, is_causal=True)[0], split(x, x, x)[0])


def test_attention_that_something_holds_on_to_stays_whole() -> None:
    def hooked(module: nn.MultiheadAttention) -> None:
        module.register_forward_hook(lambda *_: None)

    def overridden(module: nn.MultiheadAttention) -> None:
        module.forward = module.forward  # type: ignore[method-assign]

    def parametrised(module: nn.MultiheadAttention) -> None:
        parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())

    def half_parametrised(module: nn.MultiheadAttention) -> None:
        parametrize.register_parametrization(module.out_proj, "weight", nn.Identity())

    for change in (hooked, overridden, parametrised, half_parametrised):
        model = nn.Sequential(_made("packed"))
        change(model[0])
        (reason,) = attentions(model).values()
        assert reason is not None
        assert reason.partition(":")[0] in change.__name__
        assert isinstance(rf.split_attention(model)[0], nn.MultiheadAttention)
    model = nn.Sequential(_made("packed"), _made("packed"), nn.Linear(12, 12))
    model[2].weight = model[1].out_proj.weight
    first, second = attentions(model).values()
    assert first is None
    assert second == "tied: its out_proj.weight is also held by another module"


def test_splitting_in_place_changes_nothing_that_is_split_already_or_no_attention() -> None:
    model = nn.Sequential(_made("packed"), nn.Linear(12, 12))
    assert split_at(model, ()) is model
    assert split_at(model, ["1", "2", "0.out_proj"]) is model
    split = split_at(model, ["0"])
    assert split is not model
    assert split[1].weight is model[1].weight  # type: ignore[index]
    assert split_at(split, ["0"]) is split
    assert split_(split, ["0"]) is split


@pytest.mark.parametrize("kind", KINDS)
def test_split_attention_is_put_together_again_to_the_same_bits(kind: str) -> None:
    module = _made(kind)
    module.out_proj.requires_grad_(requires_grad=False)
    model = nn.Sequential(module, nn.Linear(12, 12))
    split, before = rf.split_attention(model), generator_states()
    again = joined(split)
    assert same_states(before, generator_states())
    assert type(split[0]) is SplitAttention  # type: ignore[index]
    assert type(again[0]) is nn.MultiheadAttention  # type: ignore[index]
    assert again[1].weight is split[1].weight  # type: ignore[index]
    for (name, own), (other, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(own, expected)
        assert own.requires_grad == expected.requires_grad
    assert {name: getattr(again[0], name) for name in ("kdim", "vdim", "batch_first", "num_heads", "training")} == {  # type: ignore[index]
        name: getattr(module, name) for name in ("kdim", "vdim", "batch_first", "num_heads", "training")
    }
    assert joined(model) is model


def test_split_attention_in_which_something_became_smaller_stays_split() -> None:
    for part in ("q", "k", "v", "out"):
        split = SplitAttention(_made("packed"))
        setattr(split, part, nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 12)))
        assert type(joined(split)) is SplitAttention
    assert type(joined(SplitAttention(_made("packed")))) is nn.MultiheadAttention

"""Torch's encoders and decoders around split attention."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.layers.attention import SplitAttention
from rankfold.layers.splitting import joined, split_at
from rankfold.layers.transformer import SplitDecoder, SplitEncoder

pytestmark = [  # torch's own, where it packs what is padded, or cannot
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
WIDTH, LENGTH, SAMPLES = 16, 6, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
AT_END = torch.arange(LENGTH) >= torch.tensor([6, 4, 2, 5])[:, None]
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal, not said": {"mask": CAUSAL},
    "padding": {"src_key_padding_mask": AT_END},
    "padding of all": {"src_key_padding_mask": torch.ones(SAMPLES, LENGTH, dtype=torch.bool).tril(2)},
    "both": {"mask": CAUSAL, "src_key_padding_mask": torch.zeros(SAMPLES, LENGTH).masked_fill(AT_END, float("-inf"))},
    "padding in front": {"src_key_padding_mask": AT_END.flip(1)},
}


def _drawn(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, options.pop("heads", 4), 24, **{"batch_first": True, **options})
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH))
    assert isinstance(_drawn(model), nn.TransformerEncoder)
    return model


ENCODERS: dict[str, Callable[[], nn.TransformerEncoder]] = {
    f"batch first {first}, norm first {norm}, bias {bias}": partial(
        _encoder, batch_first=first, norm_first=norm, bias=bias
    )
    for first, norm, bias in itertools.product((True, False), repeat=3)
}
ENCODERS["one head"] = lambda: _encoder(heads=1)
ENCODERS["gelu"] = lambda: _encoder(activation="gelu")
ENCODERS["another activation"] = lambda: _encoder(activation=nn.functional.silu)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_computes_the_same_wherever_the_original_is_finite(kind: str, mask: str) -> None:
    model = ENCODERS[kind]()
    x = torch.randn(SAMPLES, LENGTH, WIDTH)
    if not model.layers[0].self_attn.batch_first:
        x = x.transpose(0, 1)
    split = rf.split_attention(model)
    assert type(split) is SplitEncoder
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        expected, got = model(x, **MASKS[mask]), split(x, **MASKS[mask])
    finite = torch.isfinite(expected)
    torch.testing.assert_close(got[finite], expected[finite], atol=1e-5, rtol=1e-4)
    assert not got.is_nested


def test_one_sequence_alone() -> None:
    model, x = _encoder(), torch.randn(LENGTH, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(rf.split_attention(model)(x), model(x), atol=1e-5, rtol=1e-4)


def test_padding_is_zero_in_eval_mode_alone_as_in_the_original() -> None:
    model = _encoder(dropout=0.0)
    model.norm = None
    split, x = rf.split_attention(model), torch.randn(SAMPLES, LENGTH, WIDTH)
    with torch.no_grad():
        assert not split(x, src_key_padding_mask=AT_END)[AT_END].any()
        expected, got = (each.train()(x, src_key_padding_mask=AT_END) for each in (model, split))
    assert got[AT_END].all()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_computes_the_same(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    model = _drawn(nn.Transformer(WIDTH, 4, 2, 2, 24, batch_first=batch_first, norm_first=norm_first))
    source, target = torch.randn(SAMPLES, 5, WIDTH), torch.randn(SAMPLES, LENGTH, WIDTH)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    split = rf.split_attention(model)
    assert isinstance(split, nn.Transformer)
    assert type(split.decoder) is SplitDecoder
    assert sum(isinstance(module, SplitAttention) for module in split.modules()) == 6
    padding = AT_END[:, :5]
    for options in (
        {},
        {"tgt_mask": CAUSAL},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": padding.float().log().nan_to_num(0)},
        {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_key_padding_mask": AT_END},
    ):
        with torch.no_grad():
            expected, got = model(source, target, **options), split(source, target, **options)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_tower_without_split_attention_stays_as_it_is() -> None:
    model = _encoder()
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda *_: None)
    assert type(rf.split_attention(model)) is nn.TransformerEncoder


def test_what_is_split_in_two_steps_is_what_is_split_in_one() -> None:
    model, x = _encoder(), torch.randn(SAMPLES, LENGTH, WIDTH)
    steps = split_at(split_at(model, ["layers.1.self_attn"]), ["layers.0.self_attn"])
    with torch.no_grad():
        got, expected = (each(x, src_key_padding_mask=AT_END) for each in (steps, rf.split_attention(model)))
    assert torch.equal(got, expected)
    half = split_at(model, ["layers.1.self_attn"])
    assert type(half.layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[index,union-attr]
    with torch.no_grad():
        got, expected = (each(x, src_key_padding_mask=AT_END) for each in (half, model))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_hooks_and_attributes_of_a_tower_are_taken_over() -> None:
    model, seen = nn.Sequential(_encoder()), []
    model[0].register_forward_hook(lambda *_: seen.append(True))
    vars(model[0])["nickname"] = "tall"
    split = rf.split_attention(model)
    split(torch.randn(SAMPLES, LENGTH, WIDTH))
    assert seen == [True]
    assert split[0].nickname == "tall"  # type: ignore[index]
    again = copy.deepcopy(split)
    assert type(again[0]) is SplitEncoder  # type: ignore[index]


def _names(model: nn.Module) -> Iterator[str]:
    return (name for name in model.state_dict() if "self_attn" not in name and "multihead_attn" not in name)


def test_all_other_tensors_keep_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 4, 1, 1, 24)
    split = rf.split_attention(model)
    assert list(_names(split)) == list(_names(model))
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_tower_put_together_again_is_torchs_own() -> None:
    torch.manual_seed(0)
    model = _drawn(nn.Transformer(WIDTH, 4, 1, 1, 24, batch_first=True))
    again = joined(rf.split_attention(model))
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    x = torch.randn(SAMPLES, LENGTH, WIDTH)
    with torch.no_grad():
        assert torch.equal(again(x, x), model(x, x))


def test_a_subclass_of_a_tower_is_given_no_nested_tensor() -> None:
    class Own(nn.TransformerEncoder):
        pass

    torch.manual_seed(0)
    model = Own(nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True), 1).eval()
    split, x = rf.split_attention(model), torch.randn(SAMPLES, LENGTH, WIDTH)
    assert type(split) is Own
    with torch.no_grad():
        expected, got = (each(x, src_key_padding_mask=AT_END) for each in (model, split))
    torch.testing.assert_close(got[~AT_END], expected[~AT_END], atol=1e-5, rtol=1e-4)
    assert model.use_nested_tensor

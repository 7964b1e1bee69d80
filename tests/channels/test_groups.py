"""Channel groups: what hangs together, what reads it, and what must stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankfold import find_sites
from rankfold.channels.groups import Channels, find_channels
from rankfold.errors import ModelError, OptionError, SiteError


class Net(nn.Module):
    """Any forward over named layers."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def _channels(model: nn.Module, x: Tensor) -> Channels:
    return find_channels(model, find_sites(model.eval(), x))


IMAGE = torch.zeros(2, 3, 8, 8)


def test_a_chain_with_norm_pooling_and_flatten() -> None:
    model = nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        nn.GELU(),
        nn.Linear(10, 4),
    )
    channels = _channels(model, IMAGE)
    assert [(group.name, group.units) for group in channels] == [("0", 8), ("5", 10)]
    first, second = channels
    assert set(first.carried) == {"0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert first.read["5"] == tuple(unit for unit in range(8) for _ in range(16))
    assert second.read == {"7": tuple(range(10))}
    assert [(skip.path, skip.reason) for skip in channels.skips] == [("7", "frozen: it is in the output of the model")]
    assert "made by 0" in str(first)


def test_a_residual_stream_is_one_group() -> None:
    model = Net(
        lambda m, x: m.head((h := m.stem(x)) + m.b(m.a(h).relu())),
        stem=conv(3, 6),
        a=conv(6, 5),
        b=conv(5, 6),
        head=conv(6, 2),
    )
    groups = {group.name: group for group in _channels(model, IMAGE)}
    assert set(groups["stem"].made) == {"stem", "b"}
    assert set(groups["stem"].read) == {"a", "head"}
    assert groups["a"].made == {"a": tuple(range(5))}


def test_concatenated_channels_keep_their_places() -> None:
    model = Net(lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 5), head=conv(9, 2))
    first, second = _channels(model, IMAGE)
    assert first.read["head"] == (0, 1, 2, 3, -1, -1, -1, -1, -1)
    assert second.read["head"] == (-1, -1, -1, -1, 0, 1, 2, 3, 4)


def test_a_depthwise_convolution_carries() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 5, 1))
    (group,) = _channels(model, IMAGE)
    assert group.units == 8
    assert set(group.read) == {"4"}
    assert group.carried["2.weight"] == {0: tuple(range(8))}
    assert "2.bias" in group.carried


def test_gates_and_packed_halves_go_together() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)
        return m.down(nn.functional.silu(gate) * up)

    model = Net(forward, both=nn.Linear(6, 16), down=nn.Linear(8, 6))
    (group,) = _channels(model, torch.zeros(2, 5, 6))
    assert group.units == 8
    assert group.made["both"] == (*range(8), *range(8))
    assert group.read["down"] == tuple(range(8))


def test_squeeze_and_excite_unites_the_gate_with_what_it_gates() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        gate = m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(h * gate)

    model = Net(forward, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=conv(8, 5))
    groups = {group.name: group for group in _channels(model, IMAGE)}
    assert set(groups["a"].made) == {"a", "up"}
    assert set(groups["a"].read) == {"down", "head"}
    assert groups["down"].units == 4


def test_a_channel_shuffle_is_followed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h = h.reshape(h.shape[0], 2, 3, 8, 8).transpose(1, 2).flatten(1, 2)
        return m.head(h)

    (group,) = _channels(Net(forward, a=conv(3, 6), head=conv(6, 4)), IMAGE)
    assert group.read["head"] == (0, 3, 1, 4, 2, 5)


def test_a_parameter_of_one_axis_is_carried() -> None:
    model = Net(lambda m, x: m.head(m.a(x) * m.scale), a=conv(3, 6), head=conv(6, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(6, 1, 1)))
    (group,) = _channels(model, IMAGE)
    assert group.carried["scale"] == {0: tuple(range(6))}


def test_padded_channels_freeze_what_they_meet() -> None:
    model = Net(
        lambda m, x: m.head(nn.functional.pad(m.a(x), (0, 0, 0, 0, 1, 2)) + m.b(x)),
        a=conv(3, 4),
        b=conv(3, 7),
        head=conv(7, 2),
    )
    (group,) = _channels(model, IMAGE)
    assert group.units == 4
    assert group.made["b"] == (-1, 0, 1, 2, 3, -1, -1)


FROZEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "an operator that mixes": (lambda m, x: m.head(m.a(x).cumsum(1)), "cumsum is no operator"),
    "a norm over channels": (
        lambda m, x: m.head(nn.functional.layer_norm(m.a(x), (6, 8, 8))),
        "layer_norm mixes all its channels",
    ),
    "softmax over channels": (lambda m, x: m.head(m.a(x).softmax(1)), "softmax mixes all its channels"),
    "a mean over channels": (lambda m, x: m.head(m.a(x) - m.a(x).mean(1, keepdim=True)), "mean mixes all its channels"),
    "an input of the model": (lambda m, x: m.head(m.a(x) + x.repeat(1, 2, 1, 1)), "no parameter of one axis"),
    "a weight that is computed": (
        lambda m, x: nn.functional.conv2d(m.a(x), 2 * m.head.weight),
        "no layer that can be changed",
    ),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_what_is_not_known_freezes_with_its_reason(kind: str) -> None:
    forward, reason = FROZEN[kind]
    channels = _channels(Net(forward, a=conv(3, 6), head=conv(6, 4)), IMAGE)
    assert not [group for group in channels if "a" in group.made]
    assert reason in next(skip.reason for skip in channels.skips if skip.path == "a")


class Attention(nn.Module):
    """Self-attention with rotary angles; several heads may share a key."""

    def __init__(self, heads: int = 4, keys: int = 4, width: int = 6) -> None:
        super().__init__()
        self.width, self.times = width, heads // keys
        self.q, self.k, self.v = (nn.Linear(20, count * width) for count in (heads, keys, keys))
        self.o = nn.Linear(heads * width, 20)
        self.register_buffer("angles", torch.randn(1, 1, 7, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.width)).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            angles = torch.cat([self.angles, self.angles], -1)  # type: ignore[list-item]
            half = self.width // 2
            return y * angles.cos() + torch.cat([-y[..., half:], y[..., :half]], -1) * angles.sin()

        q, k, v = turned(heads(self.q(x))), turned(heads(self.k(x))), heads(self.v(x))
        k, v = k.repeat_interleave(self.times, 1), v.repeat_interleave(self.times, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("keys", [4, 2, 1])
def test_a_head_goes_with_its_queries_keys_and_values(keys: int) -> None:
    model = nn.Sequential(Attention(keys=keys), nn.Linear(20, 20))
    channels = _channels(model, torch.zeros(2, 7, 20))
    if keys == 1:
        assert {"0.q", "0.k", "0.v"} <= {skip.path for skip in channels.skips}
        return
    group = channels.at("0.v")
    assert group.units == keys
    assert set(group.made) == {"0.q", "0.k", "0.v"}
    by_head = tuple(unit for unit in range(keys) for _ in range(6))
    assert group.made["0.k"] == group.made["0.v"] == by_head
    assert group.made["0.q"] == group.read["0.o"] == tuple(u for u in range(keys) for _ in range(24 // keys))


def test_a_mask_of_its_own_for_each_head_freezes_them() -> None:
    class Biased(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for m in (self.q, self.k, self.v))
            bias = x.mean() + torch.arange(4.0)[None, :, None, None].expand(1, 4, 7, 7)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return self.o(y.transpose(1, 2).flatten(2))

    channels = _channels(Biased(), torch.zeros(2, 7, 20))
    assert len(channels) == 0
    assert "a mask of its own for each head" in channels.skips[0].reason


def test_a_layer_called_twice_reads_both_inputs() -> None:
    model = Net(lambda m, x: m.head(m.a(x)) + m.head(m.b(x)), a=conv(3, 6), b=conv(3, 6), head=conv(6, 4))
    (group,) = _channels(model, IMAGE)
    assert set(group.made) == {"a", "b"}


def test_without_a_graph_there_is_no_group() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.a(x)) if float(x.sum()) > 0 else m.head(m.a(-x))

    channels = _channels(Net(forward, a=conv(3, 6), head=conv(6, 4)), IMAGE)
    assert len(channels) == 0
    assert channels.skips[0].kind == "no graph"


def test_an_unknown_name_is_refused_with_the_reason() -> None:
    channels = _channels(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.zeros(2, 8))
    assert channels.at("0").units == 6
    with pytest.raises(SiteError, match=r"channels that must stay \(frozen: it is in the output of the model\)"):
        channels.at("2")
    with pytest.raises(SiteError, match="an unknown name"):
        channels.at("nowhere")


class Normalised(Attention):
    """Queries and keys are normalised head by head, as in Qwen3."""

    def __init__(self) -> None:
        super().__init__(keys=2)
        self.q_norm, self.k_norm = nn.RMSNorm(self.width), nn.LayerNorm(self.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        y = nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
        )
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_a_norm_within_heads_leaves_them_whole() -> None:
    channels = _channels(nn.Sequential(Normalised(), nn.Linear(20, 20)), torch.zeros(2, 7, 20))
    group = channels.at("0.q")
    assert group.units == 2
    assert set(group.made) == {"0.q", "0.k", "0.v"}
    assert not any("norm" in name for name in group.carried)  # one weight serves every head


def test_a_norm_over_all_channels_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    reasons = {skip.path: skip.reason for skip in _channels(model, torch.zeros(2, 8)).skips}
    assert reasons["0"] == "frozen: layer_norm mixes all its channels"


def test_a_group_norm_holds_its_groups_together() -> None:
    model = nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 4))
    (group,) = _channels(model, IMAGE)
    assert group.units == 4
    assert group.made["0"] == group.carried["1.weight"][0] == tuple(unit for unit in range(4) for _ in range(3))


class Positions(Attention):
    """A bias for each head from a table, as in T5; a second attention gets a flat one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        for bias in (self.table((torch.arange(7) - torch.arange(7)[:, None]).abs()).permute(2, 0, 1)[None], None):
            q, k, v = (m(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for m in (self.q, self.k, self.v))
            mask = torch.zeros(1, 4, 7, 7) + torch.zeros(1, 1, 7, 7) if bias is None else bias
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.o(y.transpose(1, 2).flatten(2))
        return x


def test_a_table_of_biases_goes_with_its_heads() -> None:
    channels = _channels(nn.Sequential(Positions(), nn.Linear(20, 20)), torch.zeros(2, 7, 20))
    group = channels.at("0.q")
    assert group.units == 4
    assert group.carried["0.table.weight"] == {1: (0, 1, 2, 3)}


def test_a_layer_whose_weight_is_looked_at_can_lose_channels() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            y: Tensor = self.head(self.second(h.type_as(self.second.weight)).relu())
            return y

    model = Looking().eval()
    sites = find_sites(model, torch.zeros(2, 8))
    assert [site.path for site in sites.fixed] == ["second"]
    assert "second" in {skip.path for skip in sites.skips}
    assert {"first", "second"} <= {path for group in find_channels(model, sites) for path in (*group.made, *group.read)}


def test_sites_of_another_model_are_refused_and_a_layer_left_out_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    with pytest.raises(OptionError, match=r"what rankfold\.find_sites returned · got None"):
        find_channels(model, None)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="got sites of another model, a Sequential"):
        find_channels(model[:3], find_sites(model, x))
    with pytest.raises(ModelError, match=r"an nn\.Module · got str"):
        find_channels("model", find_sites(model, x))  # type: ignore[arg-type]
    (left,) = (skip.reason for skip in find_channels(model, find_sites(model, x, only=["0"])).skips if skip.path == "0")
    assert left == "frozen: 2.weight reads it, which is left alone: not selected: it is not among `only`"

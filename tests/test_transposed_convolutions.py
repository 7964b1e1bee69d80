"""Networks with transposed convolutions along the whole road: found, cut, solved, counted, saved, loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.channels.narrowing import narrow_
from rankfold.cost.counted import count
from rankfold.sites.copies import copied
from rankfold.testing.matrices import normal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RANKS: list[rf.Family] = [rf.WhitenedSVD(), rf.Tucker2(), rf.SpatialSVD()]
CHANNELS: list[rf.Family] = [rf.Interpolative()]


class Around(nn.Module):
    """Down to a quarter of the size and up again, past skips that are concatenated and added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.depthwise = nn.ConvTranspose2d(48, 48, 3, padding=1, groups=48)
        self.wide = nn.ConvTranspose2d(48, 12, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.again = nn.ConvTranspose2d(12, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Values of every pixel."""
        whole = self.first(x)
        half = self.down(whole)
        y = torch.cat([self.up(self.low(half)), half], 1)
        y = torch.relu(self.norm(self.wide(torch.relu(self.depthwise(y))))) + whole
        result: Tensor = self.out(torch.relu(y + self.again(y)))
        return result


def generator() -> nn.Sequential:
    """Numbers to a picture, as the generator of a DCGAN."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def voice() -> nn.Sequential:
    """A signal of one axis that is set four times as dense."""
    return nn.Sequential(
        nn.Conv1d(8, 24, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(24, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose1d(16, 12, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv1d(12, 1, 3, padding=1),
    )


def volume() -> nn.Sequential:
    """A decoder of three axes."""
    return nn.Sequential(
        nn.ConvTranspose3d(4, 16, 2, stride=2), nn.ReLU(), nn.ConvTranspose3d(16, 8, 2), nn.ReLU(), nn.Conv3d(8, 2, 1)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "around": (Around, (3, 8, 8)),
    "generator": (generator, (16, 1, 1)),
    "voice": (voice, (8, 12)),
    "volume": (volume, (4, 3, 3, 3)),
}

SLOW = dict.fromkeys(("around", "generator"), pytest.mark.slow)


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A network with lively weights, and data for it."""
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model, [normal(32, *size, seed=i).float() for i in range(2)]


def compressed(model: nn.Module, data: Sequence[Tensor], share: float = 0.5, **options: Any) -> rf.Compressed:
    """The network at a share of its parameters."""
    return rf.compress(model, data, budget=rf.Budget(params=share), **options)


@pytest.mark.parametrize("families", [RANKS, CHANNELS], ids=["ranks", "channels"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in NETWORKS])
def test_a_network_goes_the_whole_road(name: str, families: list[rf.Family], tmp_path: Path) -> None:
    model, data = made(name)
    one = rf.Lagrangian() if families is RANKS else None  # one plan, in place of the best of several
    out = compressed(model, data, families=families, selector=one)
    assert not any("was dropped" in note or "no graph" in note for note in out.report.notes)
    assert out.report.after.params <= 0.5 * out.report.before.params
    narrow = narrow_(copied(model), out.plan.cuts, out.plan.attributes) if out.plan.cuts else model
    assert count(out.model, data[0]) == rf.plan_cost(rf.find_sites(narrow, data[0]).with_fixed(), out.plan)
    applied = rf.apply(model, rf.Plan.from_json(out.plan.to_json()), data)
    assert count(applied, data[0]) == count(out.model, data[0])
    rf.save(out, tmp_path / "x")
    again = rf.load(tmp_path / "x", factory=NETWORKS[name][0])
    with torch.no_grad():
        assert torch.equal(again(data[0]), out.model(data[0]))
        torch.testing.assert_close(rf.merge(again, out.plan)(data[0]), out.model(data[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_families_together_keep_the_budget_and_a_plan_gives_the_same_weights() -> None:
    model, data = made("around")
    out = compressed(model, data)
    assert out.report.after.params <= 0.5 * out.report.before.params
    again = rf.execute(model, data, rf.Plan.from_json(out.plan.to_json()))
    with torch.no_grad():
        assert torch.equal(again.model(data[0]), out.model(data[0]))
    assert torch.isfinite(rf.apply(model, rf.Plan.from_json(out.plan.to_json()), data)(data[0])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_go_the_same_road(dtype: torch.dtype) -> None:
    model, data = made("voice")
    out = compressed(model.to(dtype), [each.to(dtype) for each in data], families=RANKS, selector=rf.Lagrangian())
    assert {parameter.dtype for parameter in out.model.parameters()} == {dtype}
    assert out.report.after.params <= 0.5 * out.report.before.params


@pytest.mark.parametrize("repair", [rf.Lockstep(), None], ids=["repaired", "not"])
@pytest.mark.parametrize("positions", [None, 20])
def test_a_weight_of_low_rank_is_found(repair: rf.Lockstep | None, positions: int | None) -> None:
    """Whatever the positions that are looked at: the map is the same at all of them."""
    model, data = made("voice")
    with torch.no_grad():
        layer = model.get_submodule("2")
        table = normal(16, 4, seed=1) @ normal(4, 24 * 4, seed=2) / 10  # out × in·taps
        layer.get_parameter("weight").copy_(table.reshape(16, 24, 4).transpose(0, 1))
        expected = model(data[0])
    bound = sum(parameter.numel() for parameter in model.parameters()) - 16 * 24 * 4 + 4 * (16 + 24 * 4)
    out = rf.compress(
        model,
        data,
        budget=rf.Budget(params=bound),
        only=["2"],
        families=[rf.WhitenedSVD()],
        repair=repair,
        positions=positions,
    )
    assert out.plan.at("2").rank == 4
    with torch.no_grad():
        assert float((out.model(data[0]) - expected).norm() / expected.norm()) < 1e-4


class Doubled(nn.Module):
    """Channels that a transposed convolution makes twice, and another one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.ConvTranspose2d(4, 12, 3, stride=2, padding=1)
        self.carry = nn.ConvTranspose2d(12, 12, 3, groups=12)
        self.read = nn.ConvTranspose2d(12, 5, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The picture."""
        result: Tensor = self.read(torch.relu(self.carry(torch.relu(self.make(x)))))
        return result


def test_channels_that_others_repeat_go_without_a_loss() -> None:
    """Made, carried by a depthwise layer, and read by transposed convolutions; the fold takes them up."""
    torch.manual_seed(0)
    model, data = Doubled().double().eval(), [normal(256, 4, 5, 5, seed=i) for i in range(2)]
    with torch.no_grad():
        model.make.weight[:, 6:] = 0.5 * model.make.weight[:, :6]
        model.carry.weight[6:] = 3 * model.carry.weight[:6]
        for layer, times in ((model.make, 0.5), (model.carry, 1.5)):
            assert layer.bias is not None
            layer.bias[6:] = times * layer.bias[:6]
        expected = model(data[0])
    channels = rf.find_channels(model, rf.find_sites(model, data[0]))
    assert [(group.units, set(group.made), set(group.read)) for group in channels] == [(12, {"make"}, {"read"})]
    assert set(channels[0].carried) == {"make.bias", "carry.weight", "carry.bias"}
    out = compressed(model, data, 0.55, families=CHANNELS)
    narrow: Any = out.model
    assert narrow.carry.groups == narrow.make.out_channels == narrow.read.in_channels == 6
    with torch.no_grad():
        assert float((narrow(data[0]) - expected).norm() / expected.norm()) < 1e-4


def test_other_groups_freeze_what_they_read() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Conv2d(8, 3, 1))
    x = torch.zeros(2, 3, 6, 6)
    channels = rf.find_channels(layers.eval(), rf.find_sites(layers, x))
    assert len(channels) == 0
    assert {skip.path: skip.reason for skip in channels.skips}["0"] == "frozen: 2 is a grouped convolution"


class Sized(nn.Module):
    """A layer that is told the size of its output, in some of its calls."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.always = always
        self.first, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1)
        self.last, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The picture."""
        y = torch.relu(self.first(x))
        y = torch.relu(self.up(y, output_size=(8, 8)) if self.always else self.up(self.up(y), output_size=[14, 14]))
        result: Tensor = self.out(torch.relu(self.last(y)))
        return result


@pytest.mark.parametrize("always", [True, False])
def test_a_layer_that_is_told_the_size_of_its_output_is_left_alone(always: bool) -> None:
    torch.manual_seed(0)
    model, data = Sized(always=always).eval(), [normal(24, 3, 4, 4, seed=i).float() for i in range(2)]
    sites = rf.find_sites(model, data[0])
    why = "read elsewhere: it is called with (Tensor, output_size) where a replacement takes one plain tensor"
    assert {skip.path: skip.reason for skip in sites.skips} == {"up": why}
    assert sites.fixed == ()
    out = compressed(model, data, 0.7)
    assert out.model.get_submodule("up").state_dict().keys() == {"weight", "bias"}
    assert torch.equal(out.model.get_parameter("up.weight"), model.up.weight)


class Tied(nn.Module):
    """A decoder that has its encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.last, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The picture."""
        y = torch.relu(self.both(torch.relu(self.first(x))))
        y = torch.relu(F.conv_transpose2d(y, self.both.weight, padding=1))
        result: Tensor = self.out(torch.relu(self.last(y)))
        return result


def test_a_weight_that_a_decoder_shares_with_its_encoder_freezes_both_ends() -> None:
    torch.manual_seed(0)
    model, data = Tied().eval(), [normal(24, 3, 5, 5, seed=i).float() for i in range(2)]
    sites = rf.find_sites(model, data[0])
    assert {skip.path: skip.kind for skip in sites.skips} == {"both": "read elsewhere"}
    assert sites.fixed == ()
    assert [group.name for group in rf.find_channels(model, sites)] == ["last"]
    out = compressed(model, data, 0.8)
    assert torch.equal(out.model.get_parameter("both.weight"), model.both.weight)


class Head(nn.Module):
    """A head that multiplies with the table of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(30, 12), nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every token."""
        stream = self.words(tokens)
        return F.linear(stream + self.down(torch.relu(self.up(stream))), self.words.weight)


def test_a_table_that_the_head_multiplies_with_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Head().eval()
    data = [torch.randint(0, 30, (32, 5), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert rf.find_sites(model, data[0]).fixed == ()
    out = compressed(model, data, 0.8)
    assert torch.equal(out.model.get_parameter("words.weight"), model.words.weight)

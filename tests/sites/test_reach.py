"""What blocks a budget is named with its share of the original, and so is what can be cut at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.cost.resources import Cost
from rankfold.errors import BudgetError
from rankfold.sites.reach import blockers, cuttable, reach
from rankfold.testing import random_network

VOCABULARY, WIDTH = 60, 16


class Text(nn.Module):
    """Half embeddings, a recurrent layer, a table with three owners, and two layers that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.spare = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.spare.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(self.embed(x))[0]
        hidden = hidden + self.down(self.up(hidden).relu())
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


def _tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (20, 5), generator=generator) for _ in range(2)]


def _model() -> Text:
    torch.manual_seed(0)
    return Text().eval()


@pytest.fixture(scope="module")
def text() -> rf.Sites:
    return rf.find_sites(_model(), _tokens()[0])


def test_blockers_are_the_layers_that_stay_with_share_and_reason(text: rf.Sites) -> None:
    whole = text.cost
    found = blockers(text, "params")
    assert [(one.path, one.kind, one.amount) for one in found] == [
        ("rnn", "LSTM", 4 * WIDTH * (2 * WIDTH + 2)),
        ("embed", "Embedding", VOCABULARY * WIDTH),
        ("norm", "LayerNorm", 2 * WIDTH),
    ]
    assert [one.share for one in found] == [one.amount / whole.params for one in found]
    assert [one.reason.split(":")[0] for one in found] == ["unsupported", "tied", "no matrix"]
    macs = blockers(text, "macs")
    assert [(one.path, one.amount) for one in macs] == [
        ("rnn", 5 * 4 * WIDTH * 2 * WIDTH),
        ("head", 5 * VOCABULARY * WIDTH),
    ]
    assert macs[1].reason.startswith("tied: the weight is also embed.weight")
    assert blockers(text, "macs", most=1) == macs[:1]


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_blockers_and_what_can_be_cut_are_the_whole(seed: int | None, text: rf.Sites) -> None:
    sites = text if seed is None else rf.find_sites(*random_network(seed))
    part, whole = cuttable(sites).amounts(), sites.cost.amounts()
    for name in whole:
        assert sum(one.amount for one in blockers(sites, name, most=None)) + part[name] == whole[name]
        assert reach(sites)[name] == part[name] / whole[name]


def test_a_budget_that_cannot_be_met_names_what_blocks_it() -> None:
    model, data = _model(), _tokens()
    whole = count(model, data[0])
    with pytest.raises(BudgetError) as caught:
        rf.compress(model, data, budget=rf.Budget(params=0.5), weighting=False)
    text, smallest = str(caught.value), caught.value.smallest["params"]
    assert f"where the smallest is {smallest} ({smallest / whole.params:.4f} of {whole.params})" in text
    share = 4 * WIDTH * (2 * WIDTH + 2) / whole.params
    assert f"what stays: rnn (LSTM, {share:.4f}, unsupported: " in text
    assert f"embed (Embedding, {VOCABULARY * WIDTH / whole.params:.4f}, " in text
    assert "families" not in caught.value.cure


def test_layers_that_were_not_selected_are_named_as_such() -> None:
    model, data = _model(), _tokens()
    with pytest.raises(BudgetError, match=r"up \(Linear, 0\.\d+, not selected: .*, or select more layers"):
        rf.compress(model, data, budget=rf.Budget(params=0.5), only=["down"], weighting=False)


class Reader(nn.Module):
    """Reads the weight of one of its layers by itself, so that no other module can take its place."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.free = nn.Linear(16, 64), nn.Linear(64, 16)
        self.thin = nn.Conv1d(16, 16, 3, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.free(self.read(x).relu()) + self.read.weight.sum()
        return self.thin(hidden[..., None].expand(-1, -1, 4))  # type: ignore[no-any-return]


def test_a_site_that_the_families_cannot_cut_is_named_too() -> None:
    model, data = Reader().eval(), [torch.randn(40, 16)]
    with pytest.raises(BudgetError) as caught:
        rf.compress(model, data, budget=rf.Budget(params=0.05), families=[rf.SVD(), rf.Interpolative()])
    assert "read (Linear, " in str(caught.value)
    assert "read elsewhere" in str(caught.value)


def _stock(*, wide: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, wide), nn.ReLU(), nn.Linear(wide, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("families", [[rf.Interpolative()], [rf.Interpolative(), rf.SVD()], [rf.SVD()]], ids=str)
def test_every_denominator_of_a_refusal_is_the_original(families: list[Any]) -> None:
    model, data = _stock(wide=64), [torch.randn(40, 16)]
    whole = count(model, data[0])
    with pytest.raises(BudgetError) as caught:
        rf.compress(model, data, budget=rf.Budget(params=0.01, macs=0.01), families=families, weighting=False)
    smallest = caught.value.smallest
    for name, amount in smallest.items():
        expected = f"{name} at most {int(0.01 * whole.amounts()[name])} where the smallest is {amount} "
        assert expected + f"({amount / whole.amounts()[name]:.4f} of {whole.amounts()[name]})" in str(caught.value)


def test_a_refusal_after_channels_went_speaks_of_the_original() -> None:
    from rankfold.allocation import Lagrangian
    from rankfold.channels.widths import SameShare
    from rankfold.proposals._remover import Remover

    model, x = _stock(wide=64), torch.randn(40, 16)
    sites = rf.find_sites(model, x).with_fixed()
    stats = rf.collect(model, [x], sites=sites, statistics=rf.needed([rf.Interpolative(), rf.SVD()], channels=True))
    remover = Remover.of(model, x, sites, stats, rf.Interpolative(), selectors=[SameShare()])
    whole = sites.cost.params
    with pytest.raises(BudgetError, match=rf"of {whole}\)") as caught:
        remover.plan(
            rf.Budget(params=0.03),
            share=0.5,
            sizes=SameShare(),
            families=[rf.SVD()],
            selector=Lagrangian(),
            seed=0,
            repair=None,
        )
    assert caught.value.smallest["params"] < whole


def test_the_report_says_how_much_is_left_of_what_can_be_cut() -> None:
    model, data = _model(), _tokens()
    sites = rf.find_sites(model, data[0])
    out = rf.compress(model, data, budget=rf.Budget(params=0.8), repair=None, weighting=False)
    part, rows = cuttable(sites), [row for row in out.report.rows if row.after is not None]
    left = sum((row.after for row in rows if row.after is not None), Cost())
    line = next(line for line in out.report.text().splitlines() if line.startswith("of what can be cut: "))
    share = part.params / sites.cost.params
    assert f"params {left.params / part.params:.3f} kept (it is {share:.2f} of the whole)" in line


def test_the_report_says_nothing_of_it_where_nearly_all_can_be_cut() -> None:
    model, data = _stock(wide=64), [torch.randn(40, 16)]
    out = rf.compress(model, data, budget=rf.Budget(params=0.8), repair=None, weighting=False)
    assert "of what can be cut" not in out.report.text()


def test_norms_that_lose_channels_are_not_said_to_stay() -> None:
    """What stays, all together, is no more than the smallest model."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    data = [torch.randn(64, 3, 8, 8)]
    with pytest.raises(BudgetError) as caught:
        rf.compress(model, data, budget=rf.Budget(params=0.001), families=[rf.Interpolative()])
    assert "BatchNorm" not in str(caught.value)
    assert caught.value.smallest["params"] < 100

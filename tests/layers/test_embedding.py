"""Embeddings as a layer kind."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.decompositions import Pivoted, WhitenedSVD
from rankfold.layers import PivotedLayer, adapter_for
from rankfold.testing.matrices import normal

TOKENS, WIDTH, SEEN = 60, 16, 30
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Tagger(nn.Module):
    """Tokens and their places, a norm, a layer."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH, padding_idx=0, **options)
        self.places = nn.Embedding(6, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """Values of every token."""
        both = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        result: Tensor = self.out(torch.relu(self.norm(both)))
        return result


def tagger(**options: bool) -> Tagger:
    """The network with a table of low rank but for noise."""
    torch.manual_seed(0)
    model = Tagger(**options).eval()
    with torch.no_grad():
        model.words.weight.copy_(normal(TOKENS, 5, seed=1) @ normal(5, WIDTH, seed=2))
        model.words.weight.add_(0.05 * normal(TOKENS, WIDTH, seed=3))
        model.words.weight[0] = 0
    return model


def tokens(high: int = SEEN, seed: int = 4) -> Tensor:
    """Batch of token ids below a number."""
    return torch.randint(0, high, (96, 6), generator=torch.Generator().manual_seed(seed))


def compressed(model: nn.Module, **options: object) -> rf.Compressed:
    """The network with smaller tables."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rf.compress(model, [tokens()], only=["words"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [Pivoted(), WhitenedSVD()])
@pytest.mark.parametrize("repair", [rf.Lockstep(), None])
def test_a_table_of_low_rank_becomes_smaller(family: rf.Decomposition, repair: rf.Lockstep | None) -> None:
    model = tagger()
    out = compressed(model, budget=rf.Budget(params=0.65), families=[family], repair=repair)
    decision = out.plan.at("words")
    assert isinstance(decision.rank, int)
    assert decision.rank < WIDTH
    assert out.report.after.params <= 0.65 * out.report.before.params
    with torch.no_grad():
        change = (out.model(tokens()) - model(tokens())).norm() / model(tokens()).norm()
    assert float(change) < 0.1


def test_tokens_that_the_data_does_not_hold_are_projected_like_the_others() -> None:
    model = tagger()
    out = compressed(model, budget=rf.Budget(params=0.65), families=[Pivoted()])
    unseen = torch.arange(SEEN, TOKENS)
    with torch.no_grad():
        found, expected = out.model.get_submodule("words")(unseen), model.words(unseen)
    assert bool(torch.isfinite(found).all())
    assert float((found - expected).norm() / expected.norm()) < 0.2


def test_what_occurs_often_is_kept_best() -> None:
    torch.manual_seed(0)
    model = tagger()
    with torch.no_grad():
        model.words.weight[SEEN:] = 3 * normal(TOKENS - SEEN, WIDTH, seed=5)  # large, and never read
    out = compressed(model, budget=rf.Budget(params=0.65), families=[Pivoted()])
    with torch.no_grad():
        read = out.model.get_submodule("words")(tokens()) - model.words(tokens())
    assert float(read.norm() / model.words(tokens()).norm()) < 0.1


def test_the_padding_row_stays_zero_and_its_number_is_kept() -> None:
    out = compressed(tagger(), budget=rf.Budget(params=0.65), families=[Pivoted()])
    words = out.model.get_submodule("words")
    assert isinstance(words, PivotedLayer)
    assert isinstance(words.core, nn.Embedding)
    assert words.core.padding_idx == 0
    assert float(words(torch.tensor([0])).abs().max()) == 0


def test_sparse_gradients_stay_sparse() -> None:
    out = compressed(tagger(sparse=True), budget=rf.Budget(params=0.65), families=[Pivoted()])
    out.model(tokens()).sum().backward()
    core = out.model.get_parameter("words.core.weight")
    assert core.grad is not None
    assert core.grad.is_sparse


def test_cost_counts_rows_once_and_looking_up_for_nothing() -> None:
    model = tagger()
    sites = rf.find_sites(model, tokens())
    site = sites.at("words")
    assert (site.kind, site.weight_shape, site.macs) == ("embedding", (TOKENS, WIDTH), 0)
    out = compressed(model, budget=rf.Budget(params=0.65), families=[Pivoted()])
    rank = out.plan.at("words").rank
    assert isinstance(rank, int)
    assert out.report.before.params - out.report.after.params == TOKENS * WIDTH - rank * (TOKENS + WIDTH - rank)
    assert out.report.after.macs - out.report.before.macs == 6 * rank * (WIDTH - rank)


@pytest.mark.parametrize("family", [Pivoted(), WhitenedSVD()])
def test_saved_loaded_and_merged(family: rf.Decomposition, tmp_path: Path) -> None:
    out = compressed(tagger(), budget=rf.Budget(params=0.65), families=[family])
    rf.save(out, tmp_path / "x")
    again = rf.load(tmp_path / "x", factory=Tagger)
    assert torch.equal(again(tokens(TOKENS)), out.model(tokens(TOKENS)))
    merged = rf.merge(again, out.plan)
    assert isinstance(merged.get_submodule("words"), nn.Embedding)
    torch.testing.assert_close(merged(tokens(TOKENS)), out.model(tokens(TOKENS)), rtol=1e-4, atol=1e-5)


def test_another_map_is_multiplied_into_the_table() -> None:
    layer = nn.Embedding(9, 4).double()
    adapter = adapter_for(layer)
    assert adapter is not None
    before, turn = layer(torch.arange(9)), normal(4, 4, seed=6)
    with torch.no_grad():
        adapter.rewrite(layer, turn[None])
    torch.testing.assert_close(layer(torch.arange(9)), before @ turn.mT)


def test_places_take_up_what_words_lost() -> None:
    model = tagger()
    options = {"budget": rf.Budget(params=0.6), "families": [Pivoted()]}
    both = rf.compress(model, [tokens()], exclude=["out"], **options)  # type: ignore[arg-type]
    assert bool(torch.isfinite(both.model(tokens())).all())
    assert both.report.after.params <= 0.6 * both.report.before.params


class Stream(nn.Module):
    """A stream that starts in a table, without a norm over it, so that its channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 32)
        self.up, self.down, self.out = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """One value a sample."""
        stream = self.words(tokens)
        stream = stream + self.down(torch.relu(self.up(stream)))
        result: Tensor = self.out(stream.mean(1))
        return result


@pytest.mark.parametrize("families", [[rf.Interpolative()], [Pivoted(), rf.Interpolative()]], ids=["alone", "mixed"])
def test_a_table_loses_columns_with_the_stream_that_it_starts(families: list[rf.Family], tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randint(0, 150, (64, 10), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = rf.compress(Stream(), data, budget=rf.Budget(params=0.4), families=families)
    assert not any("was dropped" in note for note in out.report.notes)
    assert out.report.after.params <= 0.4 * out.report.before.params
    if len(families) == 1:
        words = out.model.get_submodule("words")
        assert isinstance(words, nn.Embedding)
        assert words.embedding_dim == words.weight.shape[1] < 32
    rf.save(out, tmp_path / "x")
    assert torch.equal(rf.load(tmp_path / "x", factory=Stream)(data[0]), out.model(data[0]))

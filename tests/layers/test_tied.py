"""Tables that are also the weight of a head: one site, one table, two maps."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.decompositions import Pivoted, WhitenedSVD
from rankfold.errors import PlanError
from rankfold.install.tied import head_map, span_of
from rankfold.layers import PivotedLayer
from rankfold.layers.tied import heads_of, table_of
from rankfold.linalg.pooling import pooled
from rankfold.testing.matrices import normal

TOKENS, WIDTH, DEEP = 80, 16, 6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Language(nn.Module):
    """A block between a table and a head of the same weight."""

    def __init__(self, *, bias: bool = False, padding: int | None = None, tie: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=bias)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every token."""
        x = self.words(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        logits: Tensor = self.head(self.last(x))
        return logits


def language(*, bias: bool = False, padding: int | None = None) -> Language:
    """The network with a table of low rank but for noise."""
    torch.manual_seed(0)
    model = Language(bias=bias, padding=padding).eval()
    with torch.no_grad():
        table = normal(TOKENS, DEEP, seed=1) @ normal(DEEP, WIDTH, seed=2) + 0.1 * normal(TOKENS, WIDTH, seed=3)
        model.words.weight.copy_(0.3 * table)
        if padding is not None:
            model.words.weight[padding] = 0
    return model


def tokens(samples: int = 200, seed: int = 4) -> list[Tensor]:
    return list(torch.randint(0, TOKENS, (samples, 7), generator=torch.Generator().manual_seed(seed)).split(50))


FAMILIES = {"pair": WhitenedSVD(), "pivoted": Pivoted(), "plain": rf.SVD()}


@cache
def compressed(family: str = "pivoted", *, repaired: bool = True, bias: bool = False) -> rf.Compressed:
    options = {"selector": rf.Lagrangian(), "repair": rf.Lockstep() if repaired else None}
    budget = rf.Budget(params=0.6)
    return rf.compress(language(bias=bias), tokens(), budget=budget, families=[FAMILIES[family]], **options)  # type: ignore[arg-type]


def held_table(model: nn.Module) -> nn.Parameter:
    """The table, which the head has to hold as well."""
    table = table_of(model.get_submodule("words"))
    head = model.get_submodule("head")
    assert isinstance(head, nn.Sequential)
    assert head[1].weight is table
    return table


def test_a_table_and_its_head_are_one_site() -> None:
    sites = rf.find_sites(language(), tokens()[0])
    assert [site.path for site in sites] == ["words", "up", "down"]
    assert sites.skips == ()
    site = sites.at("head")
    assert site is sites.at("words")
    assert site.macs == 7 * TOKENS * WIDTH
    assert site.weight_shape == (TOKENS, WIDTH)


@pytest.mark.parametrize("family", ["pair", "pivoted"])
@pytest.mark.parametrize("repaired", [True, False])
def test_both_get_smaller_and_keep_one_table(family: str, repaired: bool) -> None:
    out = compressed(family, repaired=repaired)
    rank = out.plan.at("words").rank
    assert isinstance(rank, int)
    assert rank < WIDTH
    assert tuple(held_table(out.model).shape) == (TOKENS, rank)
    assert out.report.after.params <= 0.6 * out.report.before.params
    assert held_table(copy.deepcopy(out.model)) is not held_table(out.model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_counted_is_what_was_predicted(family: str, bias: bool) -> None:
    model, batch = language(bias=bias), tokens()[0]
    sites = rf.find_sites(model, batch)
    assert sites.cost == count(model, batch)
    stats = rf.collect(model, tokens(), sites=sites)
    for rank in (1, 5, 15):
        decisions = (rf.Decision("words", FAMILIES[family], rank), rf.Decision("up"), rf.Decision("down"))
        plan = rf.Plan(decisions, sites.skips, sites.fingerprint)
        assert count(rf.apply(model, plan, stats=stats), batch) == rf.plan_cost(sites, plan)


@pytest.mark.parametrize("repaired", [True, False])
def test_a_whole_rank_changes_nothing(repaired: bool) -> None:
    model, batch = language(bias=True), tokens()[0]
    sites = rf.find_sites(model, batch)
    decisions = (rf.Decision("words", WhitenedSVD(), WIDTH), rf.Decision("up"), rf.Decision("down"))
    plan = rf.Plan(decisions, sites.skips, sites.fingerprint, repair={"name": "lockstep"} if repaired else None)
    small = rf.apply(model, plan, tokens())
    held_table(small)
    with torch.no_grad():
        assert torch.allclose(small(batch), model(batch), atol=1e-4)


def test_the_smallest_reachable_size_falls() -> None:
    def smallest(model: nn.Module) -> int:
        with pytest.raises(rf.errors.BudgetError) as caught:
            rf.compress(model, tokens(), budget=rf.Budget(params=0.01), families=[WhitenedSVD()])
        return caught.value.smallest["params"]

    apart = language()
    apart.words.weight.requires_grad_(False)
    sites = rf.find_sites(apart, tokens()[0], exclude=["head"])
    assert "words" not in [site.path for site in sites]  # whoever leaves one alone leaves both
    assert smallest(language()) < sites.cost.params - 0.8 * TOKENS * WIDTH


def test_the_padding_row_stays_zero_and_its_number_is_kept() -> None:
    model, batch = language(padding=3), tokens()[0]
    plan = rf.Plan((rf.Decision("words", Pivoted(), 7),), (), rf.find_sites(model, batch).fingerprint)
    out = rf.apply(model, plan, tokens())
    words = out.get_submodule("words")
    assert isinstance(words, PivotedLayer)
    assert isinstance(words.core, nn.Embedding)
    assert words.core.padding_idx == 3
    assert float(words(torch.tensor([3])).detach().abs().max()) == 0


@pytest.mark.parametrize("family", ["pair", "pivoted"])
def test_a_checkpoint_holds_the_table_once_and_ties_it_again(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = compressed(family)
    rf.save(out, tmp_path / "small")
    loaded = rf.load(tmp_path / "small", factory=Language)
    table = held_table(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()[0]), out.model(tokens()[0]))
    with safe_open(str(tmp_path / "small" / "model.safetensors"), framework="pt") as file:
        tall = [name for name in file.keys() if file.get_tensor(name).shape == table.shape]  # noqa: SIM118 - no dict
    assert len(tall) == 1


@pytest.mark.parametrize("repaired", [True, False])
def test_the_plan_carried_out_again_gives_the_same_bits(repaired: bool) -> None:
    out = compressed(repaired=repaired)
    plan = rf.Plan.from_json(out.plan.to_json())
    mine = language()
    for again in (rf.apply(language(), plan, tokens()), rf.apply_(mine, plan, tokens())):
        held_table(again)
        for name, value in out.model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_merging_gives_two_dense_layers_that_compute_the_same() -> None:
    out = compressed()
    merged = rf.merge(out.model, out.plan)
    assert isinstance(merged.get_submodule("words"), nn.Embedding)
    assert isinstance(merged.get_submodule("head"), nn.Linear)
    with torch.no_grad():
        assert torch.allclose(merged(tokens()[0]), out.model(tokens()[0]), atol=1e-4)


def test_the_head_follows_what_the_compressed_network_feeds_it() -> None:
    """With the block cut hard, a head solved on its own inputs is closer than one that is not."""
    model = language()
    sites = rf.find_sites(model, tokens()[0])
    ranks = {"words": rf.Decision("words", WhitenedSVD(), 8), "up": rf.Decision("up", WhitenedSVD(), 2)}
    plan = rf.Plan(
        tuple(ranks.get(site.path, rf.Decision(site.path)) for site in sites), sites.skips, sites.fingerprint
    )
    fresh = tokens(seed=9)

    def error(repair: dict[str, str] | None) -> float:
        small = rf.apply(model, replace(plan, repair=repair), tokens())
        return rf.compare(model, small, fresh).relative_error

    assert error({"name": "lockstep"}) < error(None)


def test_a_decision_on_the_head_alone_is_refused() -> None:
    sites = rf.find_sites(language(), tokens()[0])
    plan = rf.Plan((rf.Decision("head", rf.SVD(), 3),), (), sites.fingerprint)
    with pytest.raises(
        PlanError, match="'head' · a layer with a weight of its own · got the head of the table 'words'"
    ):
        rf.apply(language(), plan, tokens())


class Third(Language):
    """A third owner."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH, TOKENS, bias=False)
        self.more.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Both heads."""
        x = self.last(self.words(tokens))
        logits: Tensor = self.head(x) + self.more(x)
        return logits


class Read(Language):
    """Code that reads the weight of the head."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits by hand."""
        logits: Tensor = self.last(self.words(tokens)) @ self.head.weight.mT
        return logits


@pytest.mark.parametrize("kind", [Third, Read])
def test_other_ties_stay_with_their_reason(kind: type[Language]) -> None:
    torch.manual_seed(0)
    reasons = {skip.path: skip.reason for skip in rf.find_sites(kind().eval(), tokens()[0]).skips}
    assert reasons["words"].startswith("tied: the weight is also head.weight")
    assert reasons["head"].startswith("tied: the weight is also words.weight")


def test_a_view_of_the_table_is_no_pair() -> None:
    model = language()
    model.head.weight = nn.Parameter(model.words.weight.data)
    assert heads_of(model) == {}
    assert {skip.path: skip.kind for skip in rf.find_sites(model, tokens()[0]).skips} == {
        "words": "tied",
        "head": "tied",
    }


def test_the_map_of_a_head_is_the_least_squares_one() -> None:
    table, span = normal(50, 9, seed=1).double(), normal(9, 4, seed=2).double()
    root = normal(50, 50, seed=3).double()
    shared = table @ span
    assert torch.allclose(span_of(table, shared), span, atol=1e-7)
    expected = torch.linalg.lstsq(root @ shared, root @ table).solution
    assert torch.allclose(head_map(table, shared, table.mT @ root.mT @ root @ table), expected, atol=1e-6)
    assert torch.allclose(head_map(table, shared, None), torch.linalg.lstsq(shared, table).solution, atol=1e-6)


@pytest.mark.parametrize("common", ["weighting", "moments"])
def test_pooled_moments_are_the_sum_where_one_side_is_common(common: str) -> None:
    one, two, three, error = (normal(7, 7, seed=seed).double() for seed in range(4))
    first, second, third = (each @ each.mT for each in (one, two, three))
    pairs = [(first, second), (2 * first, third)] if common == "weighting" else [(second, first), (third, 2 * first)]
    weighting, gram = pooled(pairs)
    expected = sum(float((error.mT @ left @ error @ right).trace()) for left, right in pairs)
    assert float((error.mT @ weighting @ error @ gram).trace()) == pytest.approx(expected)


def test_pooled_moments_lose_as_much_as_both_where_all_is_lost() -> None:
    one, two, three, four = (each @ each.mT for each in (normal(7, 7, seed=seed).double() for seed in range(4)))
    weighting, gram = pooled([(one, two), (three, four)])
    assert float((weighting @ gram).trace()) == pytest.approx(float((one @ two + three @ four).trace()))
    none = torch.zeros_like(one)
    weighting, gram = pooled([(one, two), (none, four)])
    assert torch.allclose(torch.kron(weighting, gram), torch.kron(one, two))


def test_a_table_and_channels_go_together_and_in_place_and_after_a_stop(tmp_path: Path) -> None:
    families = [Pivoted(), rf.Interpolative()]
    options = {"budget": rf.Budget(params=0.55), "families": families, "selector": rf.Lagrangian()}
    out = rf.compress(language(), tokens(), **options)  # type: ignore[arg-type]
    for run in range(2):  # the second finds the work of the first
        again = rf.compress(language(), tokens(), work_dir=tmp_path / "work", **options)  # type: ignore[arg-type]
        assert again.plan == out.plan, run
    mine = language()
    results = [again.model, rf.apply_(mine, out.plan, tokens())]
    assert results[1] is mine
    assert out.plan.cuts
    for model in results:
        held_table(model)
        for name, value in out.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

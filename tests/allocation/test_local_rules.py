"""Laws of the rules that look at no budget: an error that is given, ranks that are named, ranks beside noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BudgetError, OptionError
from rankfold.registry import from_json, to_json


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)).eval()


def images(samples: int = 60) -> list[Tensor]:
    return list(torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(20))


def compressed(selector: rf.RankSelector, **options: Any) -> rf.Compressed:
    return rf.compress(network(), images(), selector=selector, repair=None, **options)


def planned(selector: rf.RankSelector, **options: Any) -> dict[str, Any]:
    return {decision.site: decision.rank for decision in compressed(selector, **options).plan.decisions}


def test_no_site_loses_more_than_the_bound_and_one_rank_less_would() -> None:
    families = [rf.WhitenedSVD()]
    session = rf.prepare(network(), images(), families=families, weighting=False, selector=rf.ErrorBound(0.1))
    ranks = {decision.site: decision.rank for decision in session.run().plan.decisions}
    curves = rf.measure(session.model, session.stats, sites=session.sites, families=families)
    cut = 0
    for curve in curves:
        by_rank = dict(zip(curve.ranks, curve.errors, strict=True))
        if (rank := ranks[curve.site.path]) is not None:
            assert isinstance(rank, int)
            assert by_rank[rank] <= 0.1 < by_rank[rank - 1]
            cut += 1
    assert cut


def test_a_looser_bound_never_costs_more() -> None:
    sizes = [compressed(rf.ErrorBound(bound)).report.after.params for bound in (0.0, 0.01, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_named_ranks_are_taken_and_all_else_stays_dense() -> None:
    families = [rf.WhitenedSVD()]
    assert planned(rf.Fixed({"2": 5}), families=families) == {"0": None, "2": 5, "6": None}
    assert planned(rf.Fixed({"6": 3, "*": 4}), families=families) == {"0": 4, "2": 4, "6": 3}
    assert planned(rf.Fixed({"2": [7, 11]})) == {"0": None, "2": (7, 11), "6": None}  # between candidates of a grid


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"Fixed\.ranks · every pattern matches a site · got 'layer1\.\*'"):
        compressed(rf.Fixed({"2": 5, "layer1.*": 4}))


@pytest.mark.parametrize("rank", [1000, [99, 99]])
def test_a_rank_that_no_method_admits_is_an_error(rank: Any) -> None:
    with pytest.raises(OptionError, match="a rank that some method admits there"):
        compressed(rf.Fixed({"2": rank}))


@pytest.mark.parametrize("ranks", [{}, {"2": 0}, {"2": True}, {"2": "8"}, {2: 8}, {"2": []}, None, [("2", 8)]])
def test_ranks_that_are_none_are_refused(ranks: Any) -> None:
    with pytest.raises(OptionError, match=r"Fixed\.ranks"):
        rf.Fixed(ranks)


def planted_rank(rank: int) -> nn.Module:
    """A network whose second layer is of a rank, beside noise."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(16, 96), nn.Linear(96, 80), nn.Linear(80, 10)
    with torch.no_grad():
        second.weight.copy_(torch.randn(80, rank) @ torch.randn(rank, 96) / rank**0.5 + 0.5 * torch.randn(80, 96))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).eval()


def test_the_rank_beside_noise_is_kept_and_noise_is_left_alone() -> None:
    model, data = planted_rank(6), [torch.randn(60, 16, generator=torch.Generator().manual_seed(1))]
    ranks = {}
    for weaken in (1.0, 0.5):
        selector = rf.EVBMF(weaken=weaken)
        out = rf.compress(model, data, selector=selector, families=[rf.SVD()], repair=None)
        ranks[weaken] = {decision.site: decision.rank for decision in out.plan.decisions}
    assert ranks[1.0]["2"] == 6
    assert ranks[0.5]["2"] == 43  # 80 − 0.5 (80 − 6)
    assert ranks[1.0]["0"] is None  # freshly initialised: nothing but noise


def test_noise_is_clamped_on_request() -> None:
    model, data = planted_rank(6), [torch.randn(60, 16, generator=torch.Generator().manual_seed(1))]
    selector = rf.EVBMF(weaken=1.0, noise="clamp")
    out = rf.compress(model, data, selector=selector, families=[rf.SVD()], repair=None)
    assert {decision.site: decision.rank for decision in out.plan.decisions}["0"] == 1


def test_without_a_strength_the_budget_is_kept() -> None:
    model, data = planted_rank(6), [torch.randn(60, 16, generator=torch.Generator().manual_seed(1))]
    for share in (0.9, 0.6, 0.3):
        out = rf.compress(
            model, data, budget=rf.Budget(params=share), selector=rf.EVBMF(), families=[rf.SVD()], repair=None
        )
        assert out.report.after.params <= share * out.report.before.params


@pytest.mark.parametrize("selector", [rf.EVBMF(weaken=0.1), rf.ErrorBound(0.0), rf.Fixed({"6": 9})], ids=str)
def test_a_budget_that_the_rule_does_not_keep_is_an_error_that_names_what_it_reaches(selector: rf.RankSelector) -> None:
    with pytest.raises(BudgetError, match="which does not look at it, keeps within it") as caught:
        compressed(selector, budget=rf.Budget(params=0.1))
    assert caught.value.smallest["params"] > 0.1 * sum(p.numel() for p in network().parameters())


@pytest.mark.parametrize("selector", [None, rf.Lagrangian(), rf.EVBMF(), rf.Knapsack()], ids=str)
def test_all_other_rules_need_a_budget(selector: Any) -> None:
    with pytest.raises(OptionError, match="budget"):
        rf.compress(network(), images(), selector=selector)


@pytest.mark.parametrize("selector", [rf.EVBMF(weaken=0.7), rf.ErrorBound(0.2), rf.Fixed({"a": 3, "b.*": [2, 3]})])
def test_they_survive_json(selector: rf.RankSelector) -> None:
    assert from_json(to_json(selector), rf.RankSelector, place="test") == selector


@pytest.mark.parametrize("options", [{"weaken": 0}, {"weaken": 1.5}, {"weaken": "x"}, {"noise": "drop"}, {"noise": 1}])
def test_options_of_evbmf_that_are_none_are_refused(options: Any) -> None:
    with pytest.raises(OptionError, match=r"EVBMF\."):
        rf.EVBMF(**options)


@pytest.mark.parametrize("error", [-0.1, 1.1, "x", float("nan"), None, True])
def test_an_error_that_is_none_is_refused(error: Any) -> None:
    with pytest.raises(OptionError, match=r"ErrorBound\.error"):
        rf.ErrorBound(error)

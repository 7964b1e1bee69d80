"""Coherence: what is followed for all ranks at once, against every rank followed by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankfold as rf
from rankfold.channels.narrowing import narrowed_statistics
from rankfold.data.draws import generator
from rankfold.decompositions import WhitenedSVD, factorise
from rankfold.errors import RankfoldError
from rankfold.outputs.taken import settled
from rankfold.statistics import Coherence
from rankfold.statistics._coherence import coherences, shrunk_towards_mean
from rankfold.statistics.gradients import _differentiated


class Pooled(nn.Module):
    """A convolution whose outputs are averaged over all positions."""

    def __init__(self, bias: bool, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, padding=1, bias=bias, groups=groups)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Values of each image."""
        pooled: Tensor = self.last(torch.relu(self.first(x)).mean((2, 3)))
        return pooled


def images(number: int, *, alike: float = 0.0) -> Tensor:
    """Noise, with a share of it common to all positions of an image."""
    draw = torch.Generator().manual_seed(1)
    own, common = torch.randn(number, 4, 5, 5, generator=draw), torch.randn(number, 4, 1, 1, generator=draw)
    return own * (1 - alike) ** 0.5 + common * alike**0.5 + 0.5


def collected(model: nn.Module, x: Tensor) -> tuple[rf.Sites, rf.Statistics]:
    sites = rf.find_sites(model, x)
    stats = rf.collect(model, [x], sites=sites)
    assert rf.collect_gradients(model, [x], stats, sites=sites) is None
    return sites, stats


@pytest.mark.parametrize(("bias", "groups"), [(True, 1), (False, 1), (True, 2)])
def test_all_ranks_at_once_are_each_rank_by_itself(bias: bool, groups: int) -> None:
    model, x = Pooled(bias, groups).eval(), images(20)
    sites, stats = collected(model, x)
    site, found = sites.at("first"), stats.sites["first"]["coherence"].mean()[0]
    ranks = 6 // groups
    assert found.shape == (3, ranks + 1)
    taken = settled(model, [x], None)
    reached, gradients = _differentiated(model, dict(model.named_modules()), sites, x, taken, generator(0, 0, 1))
    ((_, layer, _),) = [each for each in reached if each[0].path == "first"]
    gradient = gradients[[each[0].path for each in reached].index("first")]
    assert gradient is not None
    weight = layer.weight.detach().double().unflatten(0, (groups, -1))  # type: ignore[operator, union-attr]
    for rank in range(ranks):
        felt, predicted = torch.zeros(20).double(), 0.0
        for group in range(groups):
            moments, seen = stats.moments(site, group), stats.moments(site, group, shrink=False)
            change = weight[group]
            if rank:
                change = change - factorise(WhitenedSVD(), weight[group], rank, moments).reconstruct()
            patches = F.unfold(x.double().unflatten(1, (groups, -1))[:, group], 3, padding=1)  # samples, n, positions
            if bias:
                assert seen.mean is not None
                patches = patches - seen.mean[:, None]
            g = gradient.double().unflatten(1, (groups, -1))[:, group].flatten(2)
            felt += (torch.einsum("on,snp->sop", change.flatten(1), patches) * g).sum((1, 2))
            energy = change.flatten(1) @ seen.metric("test") @ change.flatten(1).mT
            predicted += float(torch.einsum("sop,oq,sqp->", g, energy, g))
        assert float(found[0, rank]) == pytest.approx(float(felt.square().mean()), rel=1e-3)
        assert float(found[1, rank]) == pytest.approx(predicted / 20, rel=1e-3)
        assert float(found[2, rank]) == pytest.approx(float(felt.pow(4).mean()), rel=1e-3)
    assert found[:, -1].tolist() == [0, 0, 0]


def test_errors_that_all_positions_share_add_up() -> None:
    found = []
    for share in (0.0, 0.9):
        own = collected(Pooled(True).eval(), images(400, alike=share))[1].sites["first"]["coherence"]
        assert isinstance(own, Coherence)
        found.append(float(own.ratios(torch.tensor([0.5]))[0].exp()))
    assert found[1] > 2 * found[0]


def test_without_positions_there_is_nothing_to_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).eval()
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    _, stats = collected(nn.Sequential(model), x)
    own = stats.sites["0"]["coherence"]
    assert isinstance(own, Coherence)
    assert own.count == 256
    ratios, variances = own.ratios(torch.tensor([1.0, 0.3, 0.1]))
    assert bool((ratios.abs() < 3 * variances.sqrt()).all())
    assert bool(((variances > 1 / 256) & (variances < 8 / 256)).all())  # 2/n for normal changes, more for others


def test_curves_are_multiplied_by_it() -> None:
    model, x = Pooled(True).eval(), images(200, alike=0.9)
    sites, stats = collected(model, x)
    families = [rf.WhitenedSVD(), rf.SpatialSVD()]
    curves = rf.measure(model, stats, sites=sites, families=families)
    without = {name: own for name, own in stats.sites["first"].items() if name != "coherence"}
    plain = rf.Statistics({**stats.sites, "first": without}, stats.manifest, stats.fingerprint)
    apart = rf.measure(model, plain, sites=sites, families=families)
    first = sites.at("first")
    for own, independent in zip(curves.of(first), apart.of(first), strict=True):
        assert own.errors[0] / own.errors[-2] > 1.5 * independent.errors[0] / independent.errors[-2]


def test_it_is_saved_merged_and_stays_where_channels_go(tmp_path: object) -> None:
    model, x = Pooled(True).eval(), images(40)
    sites, stats = collected(model, x)
    stats.save(f"{tmp_path}/stats")
    again = rf.Statistics.load(f"{tmp_path}/stats")
    mine, theirs = stats.sites["first"]["coherence"], again.sites["first"]["coherence"]
    assert torch.equal(mine.mean(), theirs.mean())
    merged = stats.merge(again).sites["first"]["coherence"]
    assert merged.count == 2 * mine.count
    torch.testing.assert_close(merged.mean(), mine.mean())
    cuts = {"first.weight": {0: [0, 2, 3, 5]}}
    narrow = narrowed_statistics(stats, model, sites, cuts, "narrow")  # type: ignore[arg-type]
    assert narrow.sites["first"]["coherence"] is mine


def test_it_is_not_collected_in_a_forward_pass() -> None:
    model, x = Pooled(True).eval(), images(8)
    with pytest.raises((RankfoldError, TypeError), match="coherence"):
        rf.collect(model, [x], sites=rf.find_sites(model, x), statistics=["coherence"])


def test_estimates_are_drawn_together_as_far_as_chance_explains_them() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(60, generator=draw, dtype=torch.float64)
    variances = torch.full((60,), 0.04, dtype=torch.float64)
    together = shrunk_towards_mean(1 + 0.2 * noise, variances)
    assert float((together - 1).square().mean()) < 0.2 * 0.04
    true = torch.linspace(-3, 3, 60, dtype=torch.float64)
    apart = shrunk_towards_mean(true + 0.2 * noise, variances)
    torch.testing.assert_close(apart, true + 0.2 * noise, rtol=0, atol=0.08)
    unknown = variances.clone()
    unknown[0] = torch.inf
    assert abs(float(shrunk_towards_mean(true + 0.2 * noise, unknown)[0])) < 0.3  # the mean of the others
    assert shrunk_towards_mean(true, torch.full_like(true, torch.inf)).tolist() == [0.0] * 60
    torch.testing.assert_close(shrunk_towards_mean(true[:1], variances[:1]), true[:1])


def test_of_few_samples_the_curves_of_sites_are_closer_together() -> None:
    def spread(samples: int) -> float:
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())]
        _, stats = collected(nn.Sequential(*layers).eval(), torch.randn(samples, 8))
        own = {path: each["coherence"] for path, each in stats.sites.items()}
        at = torch.tensor([0.3])
        raw = torch.cat([each.ratios(at)[0] for each in own.values() if isinstance(each, Coherence)])
        told = torch.cat([each.at(at).log() for each in coherences(stats.sites).values()])
        return float(told.std() / raw.std())

    assert spread(12) < 0.7
    assert coherences({"a": {}}) == {}

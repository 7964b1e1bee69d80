"""Laws of measured scales: what one cut costs replaces what it was predicted to cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.allocation import Curves
from rankfold.allocation.measuring import coherences_at, fitted_error
from rankfold.applying import carry_out
from rankfold.comparison.few import Few
from rankfold.data.splits import Split
from rankfold.decompositions import Decomposition
from rankfold.errors import NumericsError
from rankfold.factors import Rank
from rankfold.plan import Plan
from rankfold.progress import silent
from rankfold.proposals import Asked, Cuts, RankProposer
from rankfold.proposals._channels import ChannelProposer
from rankfold.proposals._measured import FURTHEST, measured_sites
from rankfold.sites.copies import copied
from rankfold.sites.site import Site


class _Saturated(nn.Module):
    """Errors of the first branch are felt at the output far less than the gradients there say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 40), nn.Linear(12, 40), nn.Linear(80, 6)

    def forward(self, x: Tensor) -> Tensor:
        ripple = torch.sin(30 * self.first(x)) / 30  # steep everywhere, and never far from zero
        out: Tensor = self.head(torch.cat([ripple, torch.relu(self.second(x))], 1))
        return out


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Saturated().eval()


def _data(samples: int = 200) -> list[Tensor]:
    return list(torch.randn(samples, 12, generator=torch.Generator().manual_seed(1)).split(50))


def _ranks(session: rf.Session) -> Curves:
    return next(each for each in session.proposers if isinstance(each, RankProposer)).curves()


def _predicted(session: rf.Session) -> Curves:
    assert session.proposers  # collects the statistics
    return rf.measure(session.model, session.stats, sites=session.sites)


def _fitted(session: rf.Session) -> Callable[[Site, Decomposition, Rank], float]:
    def predicted(site: Site, method: Decomposition, rank: Rank) -> float:
        told = coherences_at(session.sites, session.stats)
        return fitted_error(session.model, session.stats, told, site=site, method=method, rank=rank)

    return predicted


def test_what_is_predicted_for_a_cut_is_what_its_factors_lose_on_the_samples_they_are_made_of() -> None:
    session = rf.prepare(_model(), _data(), weighting=False, families=[rf.WhitenedSVD()])
    assert session.proposers
    weight = session.model.second.weight.detach().double()
    fitted = torch.cat(list(Split(session.batches, session.every, held_out=False))).double()
    x = fitted - fitted.mean(0)
    for rank in (2, 6, 11):
        factors = rf.WhitenedSVD().decompose(weight, rank, session.stats.moments(session.sites.at("second"), 0))
        change = weight - factors.reconstruct()
        expected = float((x @ change.T).square().sum() / (x @ weight.T).square().sum())
        found = _fitted(session)(session.sites.at("second"), rf.WhitenedSVD(), rank)
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_factor_is_what_a_cut_costs_over_what_it_was_predicted_to_cost() -> None:
    session = rf.prepare(_model(), _data())
    curves = _ranks(session)
    predicted = _predicted(session)
    plans: dict[str, tuple[Plan, float]] = {}

    def kept(plan: Plan) -> float:
        carried = carry_out(
            session.model,
            copied(session.model),
            plan,
            sites=session.sites,
            stats=session.stats,
            batches=session.batches,
        )
        (cut,) = (each for each in plan.decisions if each.method is not None)
        assert cut.method is not None
        assert cut.rank is not None
        error = _fitted(session)(session.sites.at(cut.site), cut.method, cut.rank) / predicted.unit
        lost = rf.compare(
            session.model, carried.model, list(session.trials.few.batches), outputs=session.outputs
        ).divergence
        plans[cut.site] = plan, lost / error
        return lost

    again = measured_sites(predicted, Cuts(kept, session.stats.manifest, 0, silent, []), _fitted(session))
    assert set(plans) == {"first", "second", "head"}
    usual = statistics.median(ratio for _, ratio in plans.values())
    for path, (_, ratio) in plans.items():
        assert curves.factors[path] == pytest.approx(ratio / usual, rel=0.01)
        assert again.factors[path] == pytest.approx(ratio / usual, rel=0.01)
    assert curves.cost == pytest.approx(usual, rel=0.01)


def test_shapes_stay_and_scales_change() -> None:
    session = rf.prepare(_model(), _data())
    curves = _ranks(session)
    predicted = _predicted(session)
    for mine, theirs in zip(curves, predicted, strict=True):
        factor = curves.factors[mine.site.path]
        assert mine.errors == pytest.approx([error * factor for error in theirs.errors])
        assert (mine.ranks, mine.costs) == (theirs.ranks, theirs.costs)


def test_an_error_that_gradients_overstate_is_measured_smaller() -> None:
    factors = _ranks(rf.prepare(_model(), _data())).factors
    assert factors["first"] < 0.7 * factors["second"]


def test_channels_have_scales_of_their_own_and_ranks_beside_them_those_of_their_sites() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()
    data = list(torch.randn(150, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50))
    session = rf.prepare(model, data)
    proposers, trials = session.proposers, session.trials
    channels = next(each for each in proposers if isinstance(each, ChannelProposer))

    made = {
        each.name: each for each in channels.proposals(Asked(rf.Budget(params=0.5), None, rf.Lockstep(), trials.score))
    }
    curves = _ranks(session)
    (remover,) = channels._removers.values()
    assert remover is not None
    assert set(channels._factors[remover.method]) == {curve.group.name for curve in remover.curves}
    for curve in remover.curves:
        left = curve.group.units // 2
        predicted = float(curve.errors[curve.group.units - left]) / curves.unit
        measured = trials.cut(remover.alone({curve.group.name: left}, seed=0)) / (curves.cost or 1.0)
        assert 0.3 < measured / predicted < 3  # the scale was measured at another width
    made["channels + lagrangian"].make()
    (narrowed,) = remover.narrowed.values()
    assert narrowed.factors == curves.factors


def _cuts(carry_out: Callable[[Plan], float]) -> Cuts:
    return Cuts(carry_out, {}, 0, silent, [])


@pytest.mark.parametrize("lost", [0.0, math.nan, math.inf])
def test_a_cut_without_a_finite_cost_leaves_the_prediction(lost: float) -> None:
    session = rf.prepare(_model(), _data())
    predicted = _predicted(session)
    cuts = _cuts(lambda plan: lost if plan.decisions[0].method is not None else 0.01)
    measured = measured_sites(predicted, cuts, _fitted(session))
    assert "first" not in measured.factors
    assert "second" in measured.factors
    first = session.sites.at("first")
    assert [each.errors for each in measured.of(first)] == [each.errors for each in predicted.of(first)]


def test_a_cut_that_cannot_be_carried_out_is_named() -> None:
    session = rf.prepare(_model(), _data())
    predicted = _predicted(session)

    def refused(plan: Plan) -> float:
        raise NumericsError("output", law="finite", got="NaN", cure="look")

    cuts = _cuts(refused)
    assert measured_sites(predicted, cuts, _fitted(session)) is predicted
    (note,) = cuts.notes
    assert "not measured" in note
    assert "first" in note


def test_no_factor_goes_beyond_the_bound() -> None:
    session = rf.prepare(_model(), _data())
    predicted = _predicted(session)
    huge = measured_sites(
        predicted, _cuts(lambda plan: 1e9 if plan.decisions[0].method is not None else 1e-3), _fitted(session)
    )
    assert huge.factors["first"] == FURTHEST


def test_finished_work_keeps_the_scales(tmp_path: Path) -> None:
    first = _ranks(rf.prepare(_model(), _data(), work_dir=tmp_path))
    again = _ranks(rf.prepare(_model(), _data(), work_dir=tmp_path))
    assert again.factors == first.factors
    assert again.cost == first.cost
    assert [each.errors for each in again] == [each.errors for each in first]


def test_a_few_samples_lose_what_a_comparison_of_them_says() -> None:
    session = rf.prepare(_model(), _data())
    other = copied(session.model)
    with torch.no_grad():
        other.head.weight.mul_(0.9)
    assert session.outputs is None
    assert session.proposers
    (few,) = session.trials.few.batches
    assert isinstance(few, Tensor)
    fitted = torch.cat(list(Split(session.batches, session.every, held_out=False)))
    assert torch.equal(few, fitted[:16])  # of the 160 that are fitted on
    expected = rf.compare(session.model, other, [few], outputs=session.outputs).divergence
    assert session.trials.few.lost(other) == pytest.approx(expected, rel=1e-6)
    assert session.trials.few.lost(session.model) == 0
    large = replace(session.trials.few, outputs=[None])  # too large to be kept
    assert large.lost(other) == session.trials.few.lost(other)


@pytest.mark.parametrize("fixed", [False, True])
def test_single_samples_are_put_together_or_looked_at_one_by_one(fixed: bool) -> None:
    class Single(_Saturated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, 12) if fixed else x)

    torch.manual_seed(0)
    data = list(torch.cat(_data(60)).split(1))
    session = rf.prepare(Single().eval(), data)
    assert set(_ranks(session).factors) == {"first", "second", "head"}
    few = session.trials.few
    assert few.samples == 16
    assert len(few.batches) == (16 if fixed else 1)


def test_batches_of_several_shapes_are_all_looked_at() -> None:
    class Mean(_Saturated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(1))

    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(1, 2 + number % 3, 12, generator=generator) for number in range(60)]
    session = rf.prepare(Mean().eval(), data)
    assert session.proposers
    assert session.trials.few.samples == 16


def test_with_very_few_samples_errors_stay_as_predicted() -> None:
    session = rf.prepare(_model(), _data(7)[:1])
    assert _ranks(session).factors == {}


def test_every_family_of_channels_has_scales_of_its_own_and_a_failure_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(self: Few, model: nn.Module) -> float:
        raise NumericsError("output", law="finite", got="NaN", cure="look")

    families = [rf.Interpolative(rule="random"), rf.Interpolative()]
    session = rf.prepare(_model(), _data(), families=families)
    (channels,) = (each for each in session.proposers if isinstance(each, ChannelProposer))
    asked = Asked(rf.Budget(params=0.5), None, rf.Lockstep(), session.trials.score)
    channels.proposals(asked)
    first, second = (channels._factors[family] for family in families)  # type: ignore[index]
    assert first.keys() == second.keys() != set()
    assert first != second
    monkeypatch.setattr(Few, "lost", refused)
    session = rf.prepare(_model(), _data(), families=families)
    session.run(rf.Budget(params=0.5))
    session.run(rf.Budget(params=0.6))
    assert sum("not measured" in note for note in session.notes) == len(families)


def test_ranks_on_a_grid_are_measured_once() -> None:
    session = rf.prepare(_model(), _data(), selector=rf.Rounded(rf.Lagrangian(), 4))
    session.run(rf.Budget(params=0.7))
    ranks = next(each for each in session.proposers if isinstance(each, RankProposer))
    assert list(ranks._curves) == [4]


def test_a_folder_keeps_cuts_and_a_resumed_run_tells_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rightly, calls = Few.lost, 0

    def lost(self: Few, model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise NumericsError("output", law="finite", got="NaN", cure="look")
        return rightly(self, model)

    monkeypatch.setattr(Few, "lost", lost)
    first = rf.compress(_model(), _data(), budget=rf.Budget(params=0.5), work_dir=tmp_path)
    assert calls > 2
    seen = calls
    again = rf.compress(_model(), _data(), budget=rf.Budget(params=0.5), work_dir=tmp_path)
    assert calls == seen
    assert again.plan == first.plan
    assert any("not measured" in note for note in first.report.notes)
    assert set(again.report.notes) == set(first.report.notes)

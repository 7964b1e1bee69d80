"""Laws of the session: it looks at a model once, for any number of budgets, and any kind of family can propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold import registry
from rankfold import session as sessions
from rankfold.allocation import Option, Problem
from rankfold.cost.resources import Cost
from rankfold.decompositions import Family
from rankfold.errors import BudgetError, OptionError, RankfoldError
from rankfold.plan import Plan
from rankfold.proposals import Asked, FamilyForecast, Outlook, Proposal, Proposer, _base, numbers_of, proposes
from rankfold.registry import register, to_json
from rankfold.trials.attempts import Attempt
from rankfold.trials.limits import Limit
from rankfold.trials.trials import Trials


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()


def images(samples: int = 140) -> list[Tensor]:
    return list(torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(50))


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_runs_of_one_session_are_those_of_compress_and_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[Any] = []
    rightly = sessions.collect

    def counted(*args: Any, **kwargs: Any) -> Any:
        collected.append(args)
        return rightly(*args, **kwargs)

    budgets = [rf.Budget(params=0.6), rf.Budget(macs=0.4), rf.Budget(params=0.6)]
    alone = [rf.compress(network(), images(), budget=budget) for budget in budgets]
    monkeypatch.setattr(sessions, "collect", counted)
    session = rf.prepare(network(), images())
    assert not collected  # when they are first needed
    for budget, expected in zip(budgets, alone, strict=True):
        got = session.run(budget)
        assert got.plan.to_json() == expected.plan.to_json()
        assert same(got.model, expected.model)
        assert got.report.candidates == expected.report.candidates
        assert got.report.notes == expected.report.notes
    assert len(collected) == 1
    assert "statistics" not in got.report.seconds  # what this run took
    assert {"statistics", "curves", "repair"} <= set(alone[0].report.seconds)


def test_a_run_that_fails_leaves_the_session_usable() -> None:
    session = rf.prepare(network(), images(), families=[rf.WhitenedSVD()], selector=rf.Uniform())
    with pytest.raises(BudgetError):
        session.run(rf.Budget(params=0.001))
    with pytest.raises(OptionError, match=r"budget · a rankfold\.Budget"):
        session.run(0.5)  # type: ignore[arg-type]
    out = session.run(rf.Budget(params=0.5))
    alone = rf.compress(
        network(), images(), budget=rf.Budget(params=0.5), families=[rf.WhitenedSVD()], selector=rf.Uniform()
    )
    assert same(out.model, alone.model)


def test_a_session_predicts_as_a_dry_run_does() -> None:
    session = rf.prepare(network(), images())
    session.run(rf.Budget(params=0.5))
    said = session.forecast(rf.Budget(params=0.5))
    assert said.seconds["trace"] > 0
    alone = rf.compress(network(), images(), budget=rf.Budget(params=0.5), dry_run=True)
    assert said.trials == alone.trials
    assert said.smallest == alone.smallest
    assert said.bounds == alone.bounds


@dataclass(frozen=True)
class Fewer(Family):
    """A kind of its own: keeps every layer but the last dense."""

    needs: ClassVar[tuple[str, ...]] = ("input-gram",)


@pytest.fixture
def kind() -> Iterator[type[Fewer]]:
    if Fewer not in _base._PROPOSERS:
        register("test-fewer")(Fewer)
    before = dict(_base._PROPOSERS)

    @proposes(Fewer)
    class FewerProposer(Proposer):
        @classmethod
        def forecast(cls, outlook: Outlook, families: Sequence[Family], beside: Sequence[Family]) -> FamilyForecast:
            return FamilyForecast({"curves": 1000.0}, outlook.sites.cost - Cost(params=5), frozenset({"0"}))

        def proposals(self, asked: Asked) -> list[Proposal]:
            site = self.basis.sites.sites[-1]

            def make() -> Plan:
                sites = self.basis.sites
                decisions = tuple(
                    rf.Decision(each.path, rf.SVD(), 2) if each is site else rf.Decision(each.path) for each in sites
                )
                repair = None if asked.repair is None else to_json(asked.repair)
                plan = Plan(decisions, sites.skips, sites.fingerprint, sites.model, asked.budget.to_json())
                return replace(plan, calibration=dict(self.basis.stats.manifest), repair=repair)

            return [Proposal("fewer", make)]

        @classmethod
        def numbers(cls, families: Sequence[Family], **facts: Any) -> tuple[int, int]:
            return 1, 1

    yield Fewer
    _base._PROPOSERS.clear()
    _base._PROPOSERS.update(before)


def test_a_new_kind_of_family_plugs_in_beside_the_others(kind: type[Fewer]) -> None:
    budget = rf.Budget(params=0.9)
    out = rf.compress(network(), images(60), budget=budget, families=[kind()])
    assert [decision.site for decision in out.plan.changes] == ["6"]
    out = rf.compress(network(), images(60), budget=budget, families=[rf.WhitenedSVD(), kind()])
    assert "fewer" in {candidate.selector for candidate in out.report.candidates}
    assert numbers_of([rf.WhitenedSVD(), kind()], chosen_by=False) == (3, 3)
    forecast = rf.prepare(network(), images(60), families=[kind()]).forecast(budget)
    assert forecast.seconds["curves"] == 1000
    assert forecast.smallest["params"] == forecast.original.params - 5


def test_a_kind_that_nothing_proposes_for_is_refused() -> None:
    @register("test-lonely")
    @dataclass(frozen=True)
    class Lonely(Family):
        pass

    with pytest.raises(RankfoldError, match=r"Lonely · something makes plans of every kind of family"):
        rf.compress(network(), images(60), budget=rf.Budget(params=0.9), families=[Lonely()])


@pytest.fixture
def forget() -> Iterator[list[type]]:
    """Classes whose registration is taken back."""
    classes: list[type] = []
    yield classes
    for cls in classes:
        del registry._BY_NAME[registry._NAMES.pop(cls)]


def test_a_selector_can_have_choices_carried_out(forget: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    @register("either")
    @dataclass(frozen=True)
    class Either(rf.RankSelector):
        """The better of two choices, by carrying both out."""

        @property
        def reads(self) -> tuple[str, ...]:
            return ("evaluate",)

        def select(self, problem: Problem) -> tuple[Option, ...]:
            assert problem.evaluate is not None
            choices = [rf.Uniform().select(problem), rf.Lagrangian().select(problem)]
            scores = [problem.evaluate(choice) for choice in choices]
            seen.extend(scores)
            return choices[scores.index(min(scores))]

    forget.append(Either)
    carried: list[tuple[str, bool]] = []
    rightly = Trials.attempt

    def counted(self: Trials, plan: Plan, part: Any = None) -> Attempt:
        carried.append((plan.to_json(), part is None))
        return rightly(self, plan, part)

    monkeypatch.setattr(Trials, "attempt", counted)
    families = [rf.SVD(), rf.Interpolative()]
    rf.compress(network(), images(200), budget=rf.Budget(params=0.5), families=families, selector=Either())
    tried = [plan for plan, whole in carried if not whole]
    assert len(tried) > 3
    assert len(set(tried)) == len(tried)  # what was evaluated is not carried out again to be tried
    seen.clear()
    out = rf.compress(network(), images(), budget=rf.Budget(params=0.5), selector=Either())
    assert len(seen) == 2
    assert all(score > 0 for score in seen)
    named = rf.Uniform() if seen[0] <= seen[1] else rf.Lagrangian()
    other = rf.compress(network(), images(), budget=rf.Budget(params=0.5), selector=named)
    assert [(d.site, d.rank) for d in out.plan.decisions] == [(d.site, d.rank) for d in other.plan.decisions]


def test_a_selector_that_evaluates_is_refused_where_nothing_carries_plans_out(forget: list[type]) -> None:
    @register("blind")
    @dataclass(frozen=True)
    class Blind(rf.RankSelector):
        """Needs what is not there."""

        @property
        def reads(self) -> tuple[str, ...]:
            return ("evaluate",)

        def select(self, problem: Problem) -> tuple[Option, ...]:
            raise AssertionError("it is not asked")

    forget.append(Blind)
    sites = rf.find_sites(network(), images()[0])
    curves = rf.measure(network(), sites=sites, families=[rf.SVD()])
    with pytest.raises(OptionError, match=r"selector .* blind .* evaluate="):
        rf.make_plan(curves, budget=rf.Budget(params=0.5), selector=Blind())


def test_a_selector_can_look_at_spectra(forget: list[type]) -> None:
    seen: dict[str, Any] = {}

    @register("looking")
    @dataclass(frozen=True)
    class Looking(rf.RankSelector):
        """Notes what it sees."""

        @property
        def reads(self) -> tuple[str, ...]:
            return ("spectra",)

        def select(self, problem: Problem) -> tuple[Option, ...]:
            seen.update({path: own for (path, method), own in problem.spectra.items() if method == rf.SVD()})
            return rf.Uniform().select(problem)

    forget.append(Looking)
    model = network()
    families = [rf.SVD(), rf.Tucker2(whitened=False)]
    rf.compress(model, images(), budget=rf.Budget(params=0.5), families=families, selector=Looking())
    assert set(seen) == {"0", "2", "6"}
    ((spectrum,),) = seen["2"]
    weight = model[2].weight.detach().flatten(1).double()  # type: ignore[index,union-attr,operator]
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(weight))
    assert (spectrum.rows, spectrum.columns) == tuple(weight.shape)


def test_spectra_are_there_for_layers_that_lost_channels_too(forget: list[type]) -> None:
    seen: list[set[str]] = []

    @register("watching")
    @dataclass(frozen=True)
    class Watching(rf.RankSelector):
        """Notes the sites it sees."""

        @property
        def reads(self) -> tuple[str, ...]:
            return ("spectra",)

        def select(self, problem: Problem) -> tuple[Option, ...]:
            seen.append({path for path, _ in problem.spectra})
            return rf.Uniform().select(problem)

    forget.append(Watching)
    families = [rf.Interpolative(), rf.SVD()]
    rf.compress(network(), images(), budget=rf.Budget(params=0.5), families=families, selector=Watching())
    assert seen == [{"0", "2", "6"}] * 4
    many = [batch + shift for shift in range(8) for batch in images()]  # so many that errors of channels are measured
    out = rf.compress(network(), many, budget=rf.Budget(params=0.5), families=families, selector=Watching())
    assert all(each == {"0", "2", "6"} for each in seen)
    assert not any("dropped" in note for note in out.report.notes)
    sites = rf.find_sites(network(), images()[0])
    curves = rf.measure(network(), sites=sites, families=[rf.SVD()])
    with pytest.raises(OptionError, match=r"^curves · watching reads the spectra of the sites · got curves without"):
        rf.make_plan(curves, budget=rf.Budget(params=0.5), selector=Watching())


class Agreeing(Limit):
    """At most so large an error of the outputs."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.seen: list[float] = []

    def check(self, attempt: Attempt) -> None:
        self.seen.append(attempt.comparison.divergence)
        if self.seen[-1] > self.most:
            raise BudgetError("divergence", law=f"at most {self.most}", got=str(self.seen[-1]), cure="ask for less")


def test_what_is_known_only_by_measuring_can_be_bounded() -> None:
    session, budget = rf.prepare(network(), images()), rf.Budget(params=0.4)
    any_of_them = Agreeing(float("inf"))
    free = session.run(budget, limits=[any_of_them])
    assert len(any_of_them.seen) > 1
    least, most = min(any_of_them.seen), max(any_of_them.seen)
    assert least < most
    out = session.run(budget, limits=[Agreeing((least + most) / 2)])
    assert out.plan == free.plan
    assert any("was dropped: divergence" in note for note in out.report.notes)
    with pytest.raises(BudgetError, match=r"^divergence"):
        session.run(budget, limits=[Agreeing(least / 2)])
    assert session.run(budget).plan == free.plan


def test_ranks_on_a_grid_are_offered_at_multiples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1)).eval()
    data = list(torch.randn(96, 24, 6, 6, generator=torch.Generator().manual_seed(2)).split(32))
    families = [rf.Tucker2()]
    out = rf.compress(model, data, budget=rf.Budget(params=0.5), families=families, selector=rf.Rounded(multiple=8))
    ranks = [decision.rank for decision in out.plan.changes]
    assert ranks
    assert all(isinstance(rank, tuple) and all(part % 8 == 0 for part in rank) for rank in ranks)
    assert {str(decision.method) for decision in out.plan.changes} == {"tucker2(multiple_of=8)"}
    few = [rank for rank in rf.Tucker2().ranks((40, 40, 3, 3)) if _fits(rank)]
    many = [rank for rank in rf.Tucker2(multiple_of=8).ranks((40, 40, 3, 3)) if _fits(rank)]
    assert len(few) < len(many) == 25


def _fits(rank: Any) -> bool:
    return all(part % 8 == 0 for part in rank)

"""Laws of the session: it looks at a model once, for any number of budgets, and any kind of family can propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold import session as sessions
from rankfold.decompositions import Family
from rankfold.errors import BudgetError, OptionError, RankfoldError
from rankfold.plan import Plan
from rankfold.proposals import Asked, Proposal, Proposer, _base, numbers_of, proposes
from rankfold.registry import register, to_json


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
    assert numbers_of([rf.WhitenedSVD(), kind()], chosen_by=False) == (5, 4)


def test_a_kind_that_nothing_proposes_for_is_refused() -> None:
    @register("test-lonely")
    @dataclass(frozen=True)
    class Lonely(Family):
        pass

    with pytest.raises(RankfoldError, match=r"Lonely · something makes plans of every kind of family"):
        rf.compress(network(), images(60), budget=rf.Budget(params=0.9), families=[Lonely()])

"""The search for kept ratios: its groups, its study, and what it finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.allocation import Option, Problem
from rankfold.allocation.layer_groups import grouped
from rankfold.errors import DataError, DependencyError, NumericsError, OptionError
from rankfold.testing import SelectorConformance
from rankfold.testing.problems import random_problem

pytest.importorskip("optuna")


def judged(problem: Problem) -> Problem:
    """A problem whose plans cost what their errors add up to."""
    return replace(problem, evaluate=lambda chosen: sum(option.error for option in chosen))


class TestBayesian(SelectorConformance):
    selector = rf.Bayesian(groups={"*": "all"}, spans=2, n_trials=6)
    variations: ClassVar[dict[str, Any]] = {"groups": "stage", "spans": 1, "n_trials": 1, "least": 0.9, "seed": 5}

    def problems(self, resources: Sequence[str], **options: Any) -> list[Problem]:
        return [judged(each) for each in super().problems(resources, **options)]

    def test_every_option_changes_something(self, option: str) -> None:
        if option not in self.variations:
            pytest.skip("where trials are kept, and what is measured, is tested below")
        super().test_every_option_changes_something(option)


def test_stages_projections_and_spans() -> None:
    resnet = ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc"]
    assert grouped(resnet, "stage", 1) == ["conv1", "layer1", "layer1", "layer2", "fc"]
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    llama = [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]
    assert grouped(llama, "projection", 1) == ["query and key", None, "up"] * 2
    assert grouped(llama, "projection", 2) == ["query and key 1", None, "up 1", "query and key 2", None, "up 2"]
    bert = ["l.0.attention.self.value", "l.0.attention.output.dense", "l.0.intermediate.dense", "l.0.output.dense"]
    assert grouped(bert, "projection", 1) == [None, "output", "up", "down"]
    assert grouped(["a", "b"], {"a": "x"}, 1) == ["x", None]


def test_it_is_no_worse_than_what_it_starts_from() -> None:
    """Both starts are trials: the Lagrangian's ratios by group, and one for all."""
    for seed in range(5):
        problem = judged(random_problem(seed, resources=("params",)))
        assert problem.evaluate is not None
        found = problem.evaluate(rf.Bayesian(n_trials=12).select(problem))
        equal = problem.evaluate(rf.Bayesian(n_trials=1).select(problem))
        assert found <= equal


def test_the_search_finds_the_group_that_matters() -> None:
    """Two groups of equal layers, the second ten times as sensitive, as only carrying plans out tells."""
    problem = random_problem(1, resources=("params",), sites=6)
    half = len(problem.sites) // 2
    paths = [site.path for site in problem.sites]
    groups = {path: "first" if i < half else "second" for i, path in enumerate(paths)}

    def evaluate(chosen: Sequence[Option]) -> float:
        return sum(option.error * (1 if i < half else 50) for i, option in enumerate(chosen))

    problem = replace(problem, evaluate=evaluate)
    one = evaluate(rf.Bayesian(groups=groups, n_trials=1).select(problem))
    many = evaluate(rf.Bayesian(groups=groups, n_trials=20).select(problem))
    assert many < 0.9 * one


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    problem = random_problem(2, resources=("params",))
    calls = []

    def evaluate(chosen: Sequence[Option]) -> float:
        calls.append(chosen)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sum(option.error for option in chosen)

    search = rf.Bayesian(n_trials=7, storage=storage)
    with pytest.raises(KeyboardInterrupt):
        search.select(replace(problem, evaluate=evaluate))
    found = search.select(replace(problem, evaluate=evaluate))
    assert len(calls) <= 8  # three, the one that was cut off, and four more
    again = len(calls)
    assert search.select(replace(problem, evaluate=evaluate)) == found
    assert len(calls) == again


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    rf.Bayesian(n_trials=2, storage=storage).select(judged(random_problem(2, resources=("params",))))
    with pytest.raises(OptionError, match="trials of another"):
        rf.Bayesian(n_trials=3, storage=storage).select(judged(random_problem(3, resources=("params",))))
    other = rf.Bayesian(n_trials=3, storage=storage, objective=rf.KL())
    with pytest.raises(OptionError, match="trials of another"):
        other.select(judged(random_problem(2, resources=("params",))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": "stages"}, "stage"),
        ({"groups": {}}, "names of groups"),
        ({"groups": {"nothing.*": "x"}}, "every pattern matches"),
        ({"n_trials": 0}, "n_trials"),
        ({"least": 0.0}, "least"),
        ({"objective": "loss"}, "Objective"),
        ({"spans": 0}, "spans"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        rf.Bayesian(**options).select(judged(random_problem(0, resources=("params",))))


def test_without_something_that_carries_plans_out_it_is_refused() -> None:
    with pytest.raises(OptionError, match="carried out"):
        rf.Bayesian().select(random_problem(0, resources=("params",)))


def test_without_optuna_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match="rankfold\\[search\\]"):
        rf.Bayesian().select(judged(random_problem(0, resources=("params",))))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6)]
    return nn.Sequential(*layers).eval()


def data() -> list[torch.Tensor]:
    return list(torch.randn(96, 12, generator=torch.Generator().manual_seed(1)).split(32))


def test_the_whole_road(tmp_path: Path) -> None:
    """Compressed, within the budget, the plan read back, finished trials taken from `work_dir`."""
    search = rf.Bayesian(groups={"*": "all", "0": "first"}, n_trials=4, objective=rf.KL())
    options: dict[str, Any] = {"families": [rf.WhitenedSVD()], "budget": rf.Budget(params=0.6), "selector": search}
    out = rf.compress(network(), data(), **options, work_dir=tmp_path / "work")
    assert out.report.after.params <= 0.6 * out.report.before.params
    assert rf.Plan.from_json(out.plan.to_json()) == out.plan
    again = rf.compress(network(), data(), **options, work_dir=tmp_path / "work")
    assert again.plan == out.plan


def test_own_functions_are_measured_and_not_written() -> None:
    seen = []

    def smallest_weight(model: nn.Module) -> float:
        seen.append(model)
        return float(sum(p.abs().sum() for p in model.parameters()))

    search = rf.Bayesian(groups={"*": "all"}, n_trials=2, objective=rf.Measured("weights", smallest_weight))
    out = rf.compress(network(), data(), families=[rf.SVD()], budget=rf.Budget(params=0.6), selector=search)
    assert seen
    back = rf.Plan.from_json(out.plan.to_json())
    assert back == out.plan
    with pytest.raises(OptionError, match="a name"):
        rf.Measured("", smallest_weight)


PROCESS = """
import sys, rankfold as rf
from tests.allocation.test_bayesian import data, network
rf.compress(network(), data(), families=[rf.WhitenedSVD()], budget=rf.Budget(params=0.6),
            selector=rf.Bayesian(groups={"*": "all", "0": "first"}, n_trials=8, storage=sys.argv[1]))
"""


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=storage, study_name="rankfold", direction="minimize")
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, storage], cwd=Path(__file__).parents[2]) for _ in "ab"]
    assert [each.wait(timeout=240) for each in started] == [0, 0]
    trials = optuna.load_study(storage=storage, study_name="rankfold").get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert 8 <= len(complete) <= 9


def labelled(offset: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, torch.arange(len(x)) % 6 + offset) for x in data()]


def searched(objective: rf.Objective, batches: list[Any]) -> rf.Compressed:
    search = rf.Bayesian(groups={"*": "all"}, n_trials=2, objective=objective)
    return rf.compress(network(), batches, families=[rf.SVD()], budget=rf.Budget(params=0.6), selector=search)


def test_labels_of_the_data_reach_the_objective() -> None:
    assert searched(rf.CrossEntropy(), labelled()).report.after.params
    with pytest.raises(DataError, match="none"):
        searched(rf.CrossEntropy(), data())
    with pytest.raises(DataError, match="a label below 6"):
        searched(rf.CrossEntropy(), labelled(50))
    with pytest.raises(DataError, match="nothing"):
        searched(rf.CrossEntropy(), [(x, torch.full_like(y, -100)) for x, y in labelled()])


@pytest.mark.parametrize(
    ("value", "error"), [("a", OptionError), (float("nan"), NumericsError), (float("inf"), NumericsError)], ids=str
)
def test_what_is_no_number_is_an_error(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        searched(rf.Measured("mine", lambda model: value), data())


def test_a_start_that_was_cut_off_is_tried_again(tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    problem = random_problem(2, resources=("params",))

    def cut_off(chosen: Sequence[Option]) -> float:
        raise KeyboardInterrupt

    search = rf.Bayesian(n_trials=3, storage=storage)
    with pytest.raises(KeyboardInterrupt):
        search.select(replace(problem, evaluate=cut_off))
    search.select(judged(problem))
    trials = optuna.load_study(storage=storage, study_name="rankfold").get_trials(deepcopy=False)
    complete = [trial.params for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert any(all(value == 1.0 for value in params.values()) for params in complete)
    assert all(trial.state != optuna.trial.TrialState.RUNNING for trial in trials)


def test_storage_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for storage in ("nonsense", f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}"):
        with pytest.raises(OptionError, match="storage"):
            rf.Bayesian(storage=storage).select(judged(random_problem(0)))
    with pytest.raises(OptionError, match="storage"):
        rf.Bayesian(storage=3)  # type: ignore[arg-type]

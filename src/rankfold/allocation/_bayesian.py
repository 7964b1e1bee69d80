"""Kept ratios of groups of layers by Bayesian optimisation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankfold.allocation._base import RankSelector, Table, largest_fitting, pick, top_up
from rankfold.allocation._lagrangian import Lagrangian, cheapest
from rankfold.allocation.curve import Option, Problem
from rankfold.allocation.layer_groups import check_groups, grouped
from rankfold.checks import check_count, check_number
from rankfold.comparison.objectives import Objective
from rankfold.data.draws import check_seed
from rankfold.errors import DependencyError, NumericsError, OptionError
from rankfold.registry import PLAIN, UNWRITTEN, register

if TYPE_CHECKING:
    import optuna

STARTS = 10  # trials before the Gaussian process, drawn at random but for the first two
WORST = 1e300  # value of a trial whose model is wrong, or whose objective is no number
COMPLETE = 1 - 1e-9  # ratio from which a layer stays dense


@register("bayesian")
@dataclass(frozen=True)
class Bayesian(RankSelector):
    """A kept ratio for each group of layers, found by carrying plans out: few numbers, each trial a real one.

    A trial gives every group g a ratio ρ_g. A layer takes the option of least error whose cost is at most s·ρ_g times
    the dense one's, s the largest common factor within the budget, and what is left is spent where it removes most
    error: so each trial spends the budget, and keeps it. The objective is measured on held-out samples after the plan
    was carried out on a part of the samples, with the repair.
    The next ratios maximise the expected improvement under a Gaussian process with a Matérn-5/2 kernel. Two ratios are
    given to start with: one for all, and those of `Lagrangian`, group by group; so the result is not worse than either
    on these samples.

    Attributes:
        groups: "stage" (what stands before the first number of a path), "projection" (query and key, output, gate, up,
            down of a transformer; value projections stay dense), or names of groups by path or pattern; what no pattern
            matches stays dense.
        spans: Number of spans of layers, in the order of the sites, into which every group is cut.
        n_trials: Number of trials of the study, those of other processes and of runs before included.
        objective: What is lowered: None is the divergence by which candidates are judged; or `KL`, `CrossEntropy`,
            `Perplexity`, `Measured`.
        least: Least ratio of a group.
        storage: URL of Optuna's storage (`"sqlite:///study.db"`), which processes and machines share, and from which a
            killed run goes on; None keeps trials in memory.
        study: Name of the study in it.
        seed: Seed of the sampler. A trial depends on the trials before it, and on how many there were.

    Errors:
        DependencyError: Optuna is not installed (`pip install rankfold[search]`).
        OptionError: A pattern matches no layer; the storage cannot be opened; the study belongs to another network
            (told by its predicted errors), families, budget, groups or objective. The repair is not looked at.
        NumericsError: No trial has an objective that is a number.

    References:
        Bolaco, arXiv 2405.10616: 5 groups, or 5 times 4 spans, 50 trials. There the total is a constraint of the
        sampler, and ratios become ranks by one formula; we scale every trial onto the budget, and choose each layer's
        option from its curve.
    """

    groups: str | Mapping[str, str] = field(default="stage", metadata={PLAIN: True})
    spans: int = 1
    n_trials: int = 30
    objective: Objective | None = None
    least: float = 0.1
    storage: str | None = field(default=None, metadata={UNWRITTEN: True})
    study: str = "rankfold"
    seed: int = 0

    def __post_init__(self) -> None:
        check_groups("Bayesian.groups", self.groups)
        check_count("Bayesian.spans", self.spans, cure="try 4")
        check_count("Bayesian.n_trials", self.n_trials, cure="try 30")
        law = "a ratio above 0, up to 1"
        check_number("Bayesian.least", self.least, law=law, cure="try 0.1", high=1, open_low=True)
        check_seed(self.seed)
        for name, value in (("storage", self.storage or "memory"), ("study", self.study)):
            if not isinstance(value, str) or not value:
                raise OptionError(
                    f"Bayesian.{name}",
                    law="a text",
                    got=repr(value),
                    cure='try storage="sqlite:///study.db", study="mine"',
                )
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise OptionError(
                "Bayesian.objective", law="an Objective or None", got=repr(self.objective), cure="try rankfold.KL()"
            )

    def __hash__(self) -> int:
        groups = self.groups if isinstance(self.groups, str) else tuple(self.groups.items())
        return hash((groups, self.spans, self.n_trials, self.objective, self.least, self.study, self.seed))

    @property
    def reads(self) -> tuple[str, ...]:
        """ "evaluate"."""
        return ("evaluate",)

    @property
    def lowers(self) -> Objective | None:
        """The objective."""
        return self.objective

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        if not problem.options:
            return ()
        space = _Space(problem, self)
        if problem.evaluate is None:
            raise OptionError(
                "Bayesian", law="plans are carried out", got="nothing that does", cure="use rankfold.compress"
            )
        optuna = _optuna()
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = self._study(optuna)
            self._check_study(study, space)
            self._search(study, space, problem.evaluate, optuna)
            best = study.best_trial.params
            if study.best_value >= WORST:
                raise NumericsError(
                    "Bayesian.objective",
                    law="a number for one trial at least",
                    got=f"none in {self.n_trials} trials",
                    cure="look at the objective, or at the models that `rankfold.compress` gives with another selector",
                )
        finally:
            optuna.logging.set_verbosity(level)
        return space.choice(best)

    def _study(self, library: Any) -> optuna.Study:
        """The study, opened or begun.

        Raises:
            OptionError: The storage cannot be opened.
        """
        try:
            study: optuna.Study = library.create_study(
                storage=self.storage, study_name=self.study, load_if_exists=True, direction="minimize"
            )
            return study
        except Exception as cause:
            raise OptionError(
                "Bayesian.storage",
                law="a URL of Optuna's storage, in a folder that is there",
                got=f"{self.storage!r}: {str(cause).splitlines()[0][:120]}",
                cure='try "sqlite:///study.db"',
            ) from cause

    def _search(
        self, study: optuna.Study, space: _Space, evaluate: Callable[[Sequence[Option]], float], optuna: Any
    ) -> None:
        """Ask, carry out and tell until the study has its number of trials."""
        done = (optuna.trial.TrialState.COMPLETE,)
        spaces = {name: optuna.distributions.FloatDistribution(self.least, 1.0) for name in space.names}
        starts = [dict.fromkeys(space.names, 1.0), space.lagrangian(self.least)]
        seen: dict[tuple[Option, ...], float] = {}
        while len(study.get_trials(deepcopy=False, states=done)) < self.n_trials:
            started = len(study.get_trials(deepcopy=False))
            # a sampler of its own for each trial: a study that goes on draws what one that never stopped would have
            study.sampler = optuna.samplers.GPSampler(seed=(self.seed + started) % 2**32, n_startup_trials=STARTS)
            known = [trial.params for trial in study.get_trials(deepcopy=False, states=done)]
            if missing := [start for start in starts if start not in known]:
                study.enqueue_trial(missing[0])
            trial = study.ask(spaces)
            choice = space.choice(trial.params)
            try:
                if choice not in seen:
                    seen[choice] = evaluate(choice)
            except BaseException:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            value = seen[choice]
            study.tell(trial, value if math.isfinite(value) else WORST)

    def _check_study(self, study: optuna.Study, space: _Space) -> None:
        """Mark a new study with what it is about, and refuse one that is about something else."""
        mark = json.dumps(space.mark, sort_keys=True)
        known = study.user_attrs.get("rankfold")
        if known is None and not study.get_trials(deepcopy=False):
            study.set_user_attr("rankfold", mark)
        elif known != mark:
            raise OptionError(
                "Bayesian.study",
                law="a study is about one network, one budget, one set of groups and one objective",
                got=f"{self.study!r}, which holds trials of another",
                cure="give it another name, or another storage",
            )


class _Space:
    """Ratios of the groups of a problem, and the choices that they are.

    Args:
        problem: The problem.
        selector: The selector.
    """

    def __init__(self, problem: Problem, selector: Bayesian) -> None:
        self._groups = grouped([site.path for site in problem.sites], selector.groups, selector.spans)
        own = zip(problem.options, self._groups, strict=True)
        free = tuple(options if name is not None else options[:1] for options, name in own)
        self.problem = problem = replace(problem, options=free).checked()
        self._table = Table.of(problem)
        self.names = sorted({n for n, options in zip(self._groups, free, strict=True) if n and len(options) > 1})
        if not self.names:
            raise OptionError(
                "Bayesian.groups",
                law="a layer that can be made smaller is in a group",
                got=repr(selector.groups),
                cure='try groups="stage"',
            )
        self._shares = [(loads / np.maximum(loads[0], 1e-300)).max(1) for loads in self._table.loads]
        self._smallest = cheapest(problem, self._table)
        self.mark = {
            "sites": [site.path for site in problem.sites],
            "bounds": problem.bounds,
            "groups": self._groups,
            "objective": repr(selector.objective),
            "families": sorted({str(option.method) for own in problem.options for option in own[1:]}),
            "errors": f"{sum(option.error for own in problem.options for option in own):.3g}",
            "least": selector.least,
        }

    def choice(self, ratios: Mapping[str, float]) -> tuple[Option, ...]:
        """The choice of some ratios, scaled onto the budget."""

        def choose(t: float) -> list[int]:
            scale = math.inf if t >= 1 else t / (1 - t)
            return [self._at(i, ratios, scale) for i in range(len(self._shares))]

        found = largest_fitting(self.problem, choose)
        return pick(self.problem, top_up(self._table, self._smallest if found is None else found))

    def lagrangian(self, least: float) -> dict[str, float]:
        """The ratio of every group that the choice of `Lagrangian` keeps of it."""
        chosen = Lagrangian().select(self.problem)
        kept, whole = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0.0)
        for i, option in enumerate(chosen):
            if (name := self._groups[i]) in kept and name is not None:
                loads = self._table.loads[i]
                kept[name] += float(loads[self.problem.options[i].index(option)].max())
                whole[name] += float(loads[0].max())
        return {name: min(1.0, max(least, kept[name] / (whole[name] or 1.0))) for name in self.names}

    def _at(self, site: int, ratios: Mapping[str, float], scale: float) -> int:
        """The option of a site at its ratio; a site of no group stays dense."""
        name = self._groups[site]
        ratio = 1.0 if name is None or name not in ratios else ratios[name] * scale
        if ratio >= COMPLETE:
            return 0
        fits = np.flatnonzero(self._shares[site] <= ratio)
        return int(fits[np.argmin(self._table.errors[site][fits])]) if len(fits) else self._smallest[site]


def _optuna() -> Any:
    """Optuna, which is imported where it is needed.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        import optuna
    except ImportError as cause:
        raise DependencyError(
            "Bayesian", law="Optuna is installed", got=str(cause)[:120], cure="pip install 'rankfold[search]'"
        ) from cause
    return optuna

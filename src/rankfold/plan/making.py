"""Curves + budget → plan, and the predicted cost of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rankfold.allocation import Budget, Curves, Lagrangian, Option, RankSelector, Selector
from rankfold.comparison.objectives import Objective
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import Cost
from rankfold.data.draws import check_seed
from rankfold.errors import OptionError, PlanError, shown
from rankfold.plan import Decision, Plan
from rankfold.plan.repair import Lockstep
from rankfold.registry import name_of, to_json
from rankfold.sites.site import Site, Sites

DIGITS = 6  # digits of a predicted error in a plan: more are not the same on every machine
CURES: Mapping[type, str] = {
    Curves: "pass what rankfold.measure gave",
    Budget: "try rankfold.Budget(params=0.5)",
    RankSelector: "try rankfold.Uniform(), or leave it out",
    Selector: "try rankfold.Uniform(), or leave it out",
    Lockstep: "try rankfold.Lockstep(), or None",
}


def make_plan(
    curves: Curves,
    *,
    budget: Budget,
    selector: RankSelector | None = None,
    seed: int = 0,
    calibration: Mapping[str, Any] | None = None,
    repair: Lockstep | None = None,
    evaluate: Callable[[Plan, Objective | None], float] | None = None,
) -> Plan:
    """Decide for every site, under one budget for the whole model.

    Args:
        curves: Curves from `measure`.
        budget: Upper bounds; all hold for the result.
        selector: Selector of the ranks; None is `Lagrangian()`.
        seed: Seed, recorded in the plan.
        calibration: Manifest of the data, recorded in the plan.
        repair: The repair at apply time, recorded in the plan and carried out by `apply`; None for none.
        evaluate: Function that carries a plan out and returns its objective, without one the divergence of its
            outputs, for selectors that read "evaluate".

    Returns:
        The plan. Its predicted cost (`plan_cost`) is within the budget.

    Raises:
        BudgetError: The budget cannot be met; the smallest reachable value is named.
        OptionError: An argument is of another kind.
    """
    selector = Lagrangian() if selector is None else selector
    check_kinds({"curves": (curves, Curves), "budget": (budget, Budget), "selector": (selector, RankSelector)})
    if repair is not None:
        check_kinds({"repair": (repair, Lockstep)})
    check_seed(seed)
    if "evaluate" in selector.reads and evaluate is None:
        raise OptionError(
            "selector",
            law=f"{name_of(selector)} has plans carried out to choose among them",
            got="nothing that does",
            cure="pass evaluate=, or use rankfold.compress",
        )
    if "spectra" in selector.reads and curves.curves and not curves.spectra:
        raise OptionError(
            "curves",
            law=f"{name_of(selector)} reads the spectra of the sites",
            got="curves without any",
            cure="use rankfold.compress, or families that have spectra",
        )
    if "changes" in selector.reads and curves.curves and not curves.changes:
        raise OptionError(
            "curves",
            law=f"{name_of(selector)} reads how each rank changes the loss",
            got="curves without that",
            cure="use rankfold.compress with weighting=True and nested ranks, as of WhitenedSVD(), and no channels",
        )
    sites = curves.sites

    def planned(chosen: Sequence[Option]) -> Plan:
        return Plan(
            tuple(_decision(site, option, selector) for site, option in zip(sites, chosen, strict=True)),
            sites.skips,
            sites.fingerprint,
            sites.model,
            budget.to_json(),
            to_json(selector),
            seed,
            dict(calibration or {}),
            None if repair is None else to_json(repair),
            split=sites.split,
        )

    problem = curves.problem(budget)
    if evaluate is not None and "evaluate" in selector.reads:
        problem = replace(problem, evaluate=lambda chosen: evaluate(planned(chosen), selector.lowers))
    plan = planned(selector.select(problem))
    cost = plan_cost(sites, plan).amounts()
    for name, bound in budget.bounds(sites.cost).items():
        if cost[name] > bound:
            raise PlanError(
                type(selector).__name__,
                law=f"a selector keeps to the budget of {bound} {name}",
                got=str(cost[name]),
                cure="this is a defect of the selector; please report it",
            )
    return plan


def dense_plan(
    sites: Sites,
    *,
    why: str,
    seed: int = 0,
    calibration: Mapping[str, Any] | None = None,
    repair: Lockstep | None = None,
) -> Plan:
    """The plan that leaves every site dense, for others to change.

    Args:
        sites: The sites.
        why: Reason for those that could be made smaller.
        seed: Seed, recorded in the plan.
        calibration: Manifest of the data, recorded in the plan.
        repair: The repair, recorded in the plan; None for none.
    """
    return Plan(
        tuple(Decision(site.path, why=f"dense: {site.fixed or why}") for site in sites),
        sites.skips,
        sites.fingerprint,
        sites.model,
        seed=seed,
        calibration=dict(calibration or {}),
        repair=None if repair is None else to_json(repair),
        split=sites.split,
    )


def _decision(site: Site, option: Option, selector: RankSelector) -> Decision:
    """The decision about a site by the option that was chosen."""
    if option.method is None:
        return Decision(site.path, why=f"dense: {site.fixed or 'nothing smaller was worth its error'}")
    error = float(f"{option.error:.{DIGITS}g}")
    return Decision(site.path, option.method, option.rank, f"rank by {name_of(selector)}", error)


def check_kinds(given: Mapping[str, tuple[Any, type]]) -> None:
    """Refuse arguments that are no instance of their class.

    Args:
        given: Value and class of each argument, by name.

    Raises:
        OptionError: One is not; it is named.
    """
    for place, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise OptionError(place, law=f"an instance of {kind.__name__}", got=shown(value), cure=CURES[kind])


def decision_cost(site: Site, decision: Decision) -> Cost:
    """Predicted cost of one site."""
    if decision.gone:
        return Cost()
    if decision.method is None or decision.rank is None:
        return dense_cost(site)
    return site_cost(site, decision.method.form, decision.rank)


def plan_cost(sites: Sites, plan: Plan) -> Cost:
    """Predicted cost of the whole compressed model: equal to the result of `count` on the built one.

    Args:
        sites: Sites of the model that the decisions are on: the original, or the narrowed one where the plan cuts
            channels.
        plan: Any plan of that model.
    """
    total = sites.cost
    for decision in plan.decisions:
        site = sites.at(decision.site)
        total = total - dense_cost(site) + decision_cost(site, decision)
    return total

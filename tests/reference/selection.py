"""Slow, obvious answers to rank-selection problems of one bound."""

from __future__ import annotations

from itertools import pairwise, product

from rankfold.allocation import Problem


def best_by_trying_all(problem: Problem) -> float:
    """The least summed error of any choice within the bounds."""
    return min(
        sum(option.error for option in choice)
        for choice in product(*problem.options)
        if problem.fits(problem.total(choice))
    )


def lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Corners of the lower convex hull of (cost, error), from the cheapest point down to the least error."""
    hull: list[tuple[int, float]] = []
    for cost, error in sorted(points):
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (cost, error)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and hull[-1][0] == cost:
            hull.pop()
        hull.append((cost, error))
    return hull


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def hull_steps(problem: Problem, resource: str) -> tuple[float, int, list[tuple[float, int, float]]]:
    """Error and cost of the cheapest choice, and the steps (slope, cost, error) of all sites, steepest first."""
    error, cost, steps = 0.0, 0, []
    for options in problem.options:
        hull = lower_hull([(option.cost.amounts()[resource], option.error) for option in options])
        cost, error = cost + hull[0][0], error + hull[0][1]
        steps += [(_slope(a, b), b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
    return error, cost, sorted(steps)


def best_on_the_hull(problem: Problem, resource: str) -> tuple[float, float]:
    """Errors of going down the hull: in whole steps until one does not fit, and with a part of that last step.

    The second is the optimum of the linear relaxation, so no choice within the bound has a smaller error.
    """
    error, cost, steps = hull_steps(problem, resource)
    for _, more, change in steps:
        room = problem.bounds[resource] - cost
        if more > room:
            return error, error + change * room / more
        cost, error = cost + more, error + change
    return error, error


def at_the_largest_common_fraction(problem: Problem, resource: str) -> list[float]:
    """Errors of the sites where all keep the same largest fraction of their cost: the best option within it."""
    fractions = {
        option.cost.amounts()[resource] / options[0].cost.amounts()[resource]
        for options in problem.options
        for option in options
    }
    for fraction in sorted(fractions, reverse=True):
        chosen = []
        for options in problem.options:
            most = fraction * options[0].cost.amounts()[resource] * (1 + 1e-12)
            within = [option for option in options if option.cost.amounts()[resource] <= most]
            cheapest = min(options, key=lambda option: option.cost.amounts()[resource])
            chosen.append(min(within, key=lambda option: option.error) if within else cheapest)
        if problem.fits(problem.total(chosen)):
            return [option.error for option in chosen]
    raise ValueError("no common fraction fits")


def smallest_common_error(problem: Problem, resource: str) -> float:
    """The smallest ε such that the cheapest options of error at most ε fit together."""
    for threshold in sorted({option.error for options in problem.options for option in options}):
        chosen = [
            min(
                (option for option in options if option.error <= threshold),
                key=lambda option: option.cost.amounts()[resource],
            )
            for options in problem.options
        ]
        if problem.fits(problem.total(chosen)):
            return threshold
    raise ValueError("no common error fits")

"""Random rank-selection problems with a solution, for the laws of selectors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from rankfold.allocation import Option, Problem
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import Cost
from rankfold.decompositions import SVD, Decomposition, SpatialSVD
from rankfold.layers import Geometry, serves
from rankfold.sites.site import Site

FAMILIES: tuple[Decomposition, ...] = (SVD(), SpatialSVD(whitened=False))


def _anything(options: Sequence[Option], option: Option) -> bool:
    return True


def random_sites(draw: random.Random, count: int) -> list[Site]:
    """Linear layers and 2-d convolutions of drawn sizes."""
    sites = []
    for index in range(count):
        inputs, outputs = draw.randint(2, 48), draw.randint(2, 48)
        if draw.random() < 0.5:
            geometry = Geometry(inputs, outputs, bias=draw.random() < 0.5)
            sites.append(Site(f"linear{index}", (), "linear", geometry, (((), draw.randint(1, 9)),), 4))
        else:
            kernel = draw.choice([(1, 1), (3, 3), (5, 3)])
            padding = (kernel[0] // 2, kernel[1] // 2)
            geometry = Geometry(inputs, outputs, kernel, (1, 1), padding, (1, 1), bias=draw.random() < 0.5)
            size = (draw.randint(5, 20), draw.randint(5, 20))
            sites.append(Site(f"conv{index}", (), "conv", geometry, ((size, 1),), 4))
    return sites


def random_options(
    draw: random.Random, site: Site, resources: Sequence[str], families: Sequence[Decomposition]
) -> tuple[Option, ...]:
    """The dense option and those of the families that cost less in one of the resources, with drawn falling errors.

    The weight of a site's errors is drawn too: errors are comparable across sites, but need not end at 1.
    """
    weight = 10 ** draw.uniform(-2, 2)
    dense = Option(None, None, dense_cost(site), 0.0)
    options = [dense]
    for method in families:
        if method.refuses(site.geometry.canonical_shape) is not None or not serves(method.form, site.geometry):
            continue
        ranks = method.ranks(site.geometry.canonical_shape)
        energies = [draw.random() ** 4 for _ in ranks]
        tails = [weight * sum(energies[index + 1 :]) / sum(energies) for index in range(len(ranks))]
        for rank, error in zip(ranks, tails, strict=True):
            cost = site_cost(site, method.form, rank)
            if any(cost.amounts()[name] < dense.cost.amounts()[name] for name in resources):
                options.append(Option(method, rank, cost, error))
    return tuple(options)


def random_problem(
    seed: int,
    *,
    sites: int = 6,
    resources: Sequence[str] = ("params",),
    families: Sequence[Decomposition] = FAMILIES,
    allowed: Callable[[Sequence[Option], Option], bool] = _anything,
    tight: bool = False,
) -> Problem:
    """A problem that has a solution, since its bounds are the cost of a drawn choice.

    Args:
        seed: Seed of everything that is drawn.
        sites: Number of sites.
        resources: Names of the bounded resources.
        families: Methods that the options are of.
        allowed: Function of (all options of a site, one of them): True if the drawn choice may hold that one.
        tight: True to draw the cheapest choice in the first resource instead of any.

    Returns:
        The problem.
    """
    draw = random.Random(seed)
    places = random_sites(draw, sites)
    options = [random_options(draw, site, resources, families) for site in places]
    witness = Cost()
    for each in options:
        possible = [option for option in each if allowed(each, option)]
        cheapest = min(possible, key=lambda option: option.cost.amounts()[resources[0]])
        witness = witness + (cheapest if tight else draw.choice([cheapest, draw.choice(possible)])).cost
    fixed = Cost(draw.randint(0, 500), draw.randint(0, 500), draw.randint(0, 2000))
    whole = sum((dense_cost(site) for site in places), fixed)
    bounds = {name: witness.amounts()[name] for name in resources}
    return Problem(tuple(places), tuple(options), bounds, fixed, whole).checked()


def with_bounds(problem: Problem, **bounds: int) -> Problem:
    """The problem under other bounds on the sum over its sites, unchecked."""
    return replace(problem, bounds=bounds)

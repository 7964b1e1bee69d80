"""Statistics + decompositions → rank curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.allocation import Selector
from rankfold.allocation.curve import Changes, Curves, RankCurve, Spectra
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.decompositions import (
    CP,
    SVD,
    Decomposition,
    Family,
    Interpolative,
    Moments,
    Pivoted,
    SpatialSVD,
    Tucker2,
    WhitenedSVD,
    damped_gradients,
    factorise,
    judged_energy,
    output_errors,
)
from rankfold.distributed import ALONE, World
from rankfold.errors import DataError, OptionError, shown
from rankfold.factors import Rank
from rankfold.layers import adapter_for, serves
from rankfold.linalg.precision import widen
from rankfold.progress import Progress, Told, as_progress, silent
from rankfold.sites.finding import check_sites
from rankfold.sites.site import Site, Sites
from rankfold.statistics import GradientGram, LossGradient, Statistics
from rankfold.statistics._coherence import CoherenceCurve, coherences

DEFAULT_FAMILIES: tuple[Decomposition, ...] = (
    WhitenedSVD(),
    Pivoted(WhitenedSVD(), kernels=False),
    SpatialSVD(),
    Tucker2(),
    CP(),
)


def default_families(selector: Selector | None) -> tuple[Family, ...]:
    """The families of `compress` where none are named: all, or those whose sizes a selector chooses."""
    families: tuple[Family, ...] = (*DEFAULT_FAMILIES, Interpolative())
    return tuple(family for family in families if selector is None or family.sized_by == selector.chooses)


def measure(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    sites: Sites,
    families: Sequence[Decomposition] = DEFAULT_FAMILIES,
    progress: Progress | Told = silent,
    world: World = ALONE,
) -> Curves:
    """Measure the cost and the error of every rank, for every site and every family that can make it smaller.

    Where the statistics hold the gradient Gram `G` of every site, the error is the Gauss–Newton estimate of the
    squared change of the network's output, `tr(G D A Dᵀ)`, times the coherence of such errors where it was collected
    (`rankfold.statistics.Coherence`); otherwise the energy of the site's output error over the energy of its output,
    `tr(D A Dᵀ)/tr(W A Wᵀ)`. Either way errors of different layers can be summed. They are scaled so that losing every
    site's output costs 1 a site on average.

    Args:
        model: The model the statistics are of.
        stats: Statistics from `collect`; may be None if no family needs any.
        sites: Sites from `find_sites`.
        families: Methods to measure.
        progress: Callback for every site.
        world: Processes that divide the sites among themselves; each of them gets all curves.

    Returns:
        The curves.

    Raises:
        DataError: A family needs statistics that were not collected.
        OptionError: `families` is empty or holds something that is no method; `stats` or `sites` are of another kind.
        ModelError: The model is no module, or has tensors on meta.
        SiteError: The sites are of another model.
    """
    check_families(families)
    progress = as_progress(progress)
    model = check_sites(model, sites)
    if stats is not None and not isinstance(stats, Statistics):
        raise OptionError(
            "stats", law="an instance of Statistics, or None", got=shown(stats), cure="pass what rankfold.collect gave"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    curves: list[RankCurve] = []
    told = coherences_at(sites, stats)
    weighted = told is not None
    with progress("curves", len(sites)) as advance:
        for number, site in enumerate(sites):
            own = [method for method in methods_at(site, families) if _saves(site, method)]
            for method in own:
                _check_collected(site, method, stats)
            groups = range(site.geometry.groups if own and world.owns(number) else 0)
            fits = [_fits(site, group, stats) for group in groups]
            coherence = None if told is None else told.get(site.path)
            curves += [_curve(site, modules[site.path], method, fits, weighted, coherence) for method in own]
            advance()
    curves = _exchanged(curves, world)
    scale = _mean_energy(curves) if weighted else 1.0
    return Curves(sites, tuple(curve.scaled(1 / scale) for curve in curves), unit=scale)


def coherences_at(sites: Sites, stats: Statistics | None) -> dict[str, CoherenceCurve] | None:
    """Coherences by path where the errors of all sites are weighted by gradients; None where they are not."""
    if stats is None or not all("gradient-gram" in stats.sites.get(site.path, {}) for site in sites):
        return None
    return coherences(stats.sites)


def fitted_error(
    model: nn.Module,
    stats: Statistics | None,
    told: Mapping[str, CoherenceCurve] | None,
    *,
    site: Site,
    method: Decomposition,
    rank: Rank,
) -> float:
    """The error predicted for a cut on the very samples that its factors are made of, in the unit of `measure`.

    A curve is judged on samples that its factors were not made of; this is to be compared with what the cut really does
    to the samples at hand.

    Args:
        model: The model the statistics are of.
        stats: Statistics from `collect`.
        told: What `coherences_at` gave.
        site: The site.
        method: Its method.
        rank: Its rank.
    """
    module = model.get_submodule(site.path)
    adapter = adapter_for(module)
    if adapter is None:
        raise TypeError(f"{site.path} has no adapter")
    lost = energy = 0.0
    for group, weight in enumerate(widen(adapter.canonical(module))):
        moments = moments_of(site, group, method, stats)
        judge = moments if stats is None else stats.moments(site, group, shrink=False)
        if judge.gradient_gram is not None:
            judge = replace(judge, gradient_gram=damped_gradients(judge.gradient_gram.to(weight)))
        change = weight - factorise(method, weight, rank, moments).reconstruct()
        lost += float(judged_energy(change.flatten(1), judge, method))
        energy += float(judged_energy(weight.flatten(1), judge, method))
    if told is None:
        return lost / energy if energy > 0 else 0.0
    coherence = told.get(site.path)
    return lost if coherence is None or energy <= 0 else lost * float(coherence.at(torch.tensor([lost / energy])))


def spectra_of(
    model: nn.Module, stats: Statistics | None, *, sites: Sites, families: Sequence[Decomposition]
) -> Spectra:
    """Singular values that the ranks of each family truncate at each site, for selectors that read them.

    Args:
        model: The model the statistics are of.
        stats: Statistics from `collect`; may be None if no family needs any.
        sites: Sites from `find_sites`.
        families: Methods.

    Returns:
        Spectra by path and method, one tuple per group; a method without any, or that does not apply at a site, is
        left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for site in sites:
        adapter = adapter_for(modules[site.path])
        if adapter is None:
            raise TypeError(f"{site.path} has no adapter")
        weights = widen(adapter.canonical(modules[site.path]))
        for method in methods_at(site, families):
            moments = (moments_of(site, group, method, stats) for group in range(len(weights)))
            own = tuple(method.spectra(weight, each) for weight, each in zip(weights, moments, strict=True))
            if any(own):
                found[site.path, method] = own
    return found


def changes_of(model: nn.Module, stats: Statistics, *, sites: Sites, families: Sequence[Decomposition]) -> Changes:
    """Predicted change of the loss at each rank of each family at each site, to first order; see `ZeroSum`.

    Args:
        model: The model the statistics are of.
        stats: Statistics with a "loss-gradient" of the sites.
        sites: Sites from `find_sites`.
        families: Methods; those whose ranks are not nested are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, Decomposition], dict[Rank, float]] = {}
    for site in sites:
        adapter, gradient = adapter_for(modules[site.path]), stats.sites.get(site.path, {}).get(LossGradient.name)
        if adapter is None or gradient is None:
            continue
        weights = widen(adapter.canonical(modules[site.path]))
        for method in methods_at(site, families):
            own = [
                method.changes(weight, moments_of(site, group, method, stats), gradient.mean(group=group).to(weight))
                for group, weight in enumerate(weights)
            ]
            if all(each is not None for each in own):
                rows = torch.stack([each for each in own if each is not None]).sum(0).tolist()
                found[site.path, method] = dict(zip(method.ranks(site.geometry.canonical_shape), rows, strict=True))
    return found


def methods_at(site: Site, families: Sequence[Decomposition]) -> list[Decomposition]:
    """The methods that apply at a site, without one of which another of them stores the same map in fewer numbers."""
    layer = site.geometry
    own = [
        method
        for method in families
        if not site.fixed and method.refuses(layer.canonical_shape) is None and serves(method.form, layer)
    ]
    stored = {method.map for method in own if method.map != method}
    return [method for method in own if method not in stored]


def _saves(site: Site, method: Decomposition) -> bool:
    """Whether the least rank costs less than the layer in any resource; a depthwise 3×3 in matrix form does not."""
    least = site_cost(site, method.form, method.ranks(site.geometry.canonical_shape)[0]).amounts()
    return any(least[name] < cost for name, cost in dense_cost(site).amounts().items())


def check_families(families: Sequence[Family]) -> None:
    """Check that the families are a list of at least one method.

    Raises:
        OptionError: They are no list, an empty one, or one with anything that is no instance of a method.
    """
    alone = isinstance(families, Family)
    if alone or not isinstance(families, Sequence) or isinstance(families, str):
        raise OptionError(
            "families",
            law="a list of methods",
            got=shown(families),
            cure="put it in brackets" if alone else "try [rankfold.WhitenedSVD()]",
        )
    if not families:
        raise OptionError("families", law="at least one method", got="none", cure="try [rankfold.WhitenedSVD()]")
    for method in families:
        if not isinstance(method, Family):
            raise OptionError(
                "families", law="instances of methods", got=repr(method), cure=f"try {SVD.__name__}() with parentheses"
            )


def needed(families: Sequence[Family], *, channels: bool = False) -> list[str]:
    """Names of the statistics that any of the families reads, and with `channels` those that channel removal reads."""
    own = set(Interpolative.needs) if channels else set()
    return sorted(own.union(*(method.needs for method in families)) - {GradientGram.name})  # a pass of its own


def moments_of(site: Site, group: int, method: Decomposition, stats: Statistics | None) -> Moments:
    """The moments a method reads at one group of a site.

    Raises:
        DataError: The statistics of the moments were not collected.
    """
    _check_collected(site, method, stats)
    return Moments(bias=site.geometry.bias) if stats is None else stats.moments(site, group)


def _check_collected(site: Site, method: Decomposition, stats: Statistics | None) -> None:
    """Refuse statistics that lack what a method reads.

    Raises:
        DataError: A statistic that the method reads is missing.
    """
    if stats is None and method.needs:
        raise DataError(
            repr(site.path),
            law=f"{method} reads {', '.join(method.needs)}",
            got="no statistics",
            cure="pass data, or statistics collected with rankfold.collect",
        )
    missing = [name for name in method.needs if stats is not None and name not in stats.sites.get(site.path, {})]
    if missing:
        raise DataError(
            repr(site.path),
            law=f"{method} reads {', '.join(method.needs)}",
            got=f"no {', '.join(missing)}",
            cure="leave weighting=True, or call rankfold.collect_gradients"
            if missing == [GradientGram.name]
            else "collect with statistics=rankfold.needed(families)",
        )


# Moments that factors are made with, and moments that they are judged on; None means the same moments.
_Fits: TypeAlias = list[tuple[Moments, Moments | None]]


def _fits(site: Site, group: int, stats: Statistics | None) -> _Fits:
    """Moments that factors of a group are made with and judged on: those of the two halves of the samples, if known."""
    if stats is None:
        return [(Moments(bias=site.geometry.bias), None)]
    if not stats.has_halves(site.path):
        return [(stats.moments(site, group), None)]
    own = [stats.moments(site, group, half=half) for half in (0, 1)]
    other = [stats.moments(site, group, half=half, shrink=False) for half in (1, 0)]
    return list(zip(own, other, strict=True))


def _curve(
    site: Site,
    module: nn.Module,
    method: Decomposition,
    fits: Sequence[_Fits],
    weighted: bool,
    coherence: CoherenceCurve | None,
) -> RankCurve:
    """The curve of one method at a site, from the fits of its groups; all zeros where another process has the fits."""
    adapter = adapter_for(module)
    if adapter is None:
        raise TypeError(f"{site.path} has no adapter")
    weight = widen(adapter.canonical(module))
    ranks = method.ranks(site.geometry.canonical_shape)
    summed, total = weight.new_zeros(len(ranks)), 0.0
    for group, own in enumerate(fits):
        for moments, judge in own:
            relative, energy = output_errors(method, weight[group], moments, judge)
            summed += relative.to(summed) * energy / len(own)  # the mean of two halves
            total += energy / len(own)
    errors = summed if weighted or total <= 0 else summed / total
    costs = tuple(site_cost(site, method.form, rank) for rank in ranks)
    if coherence is None:
        whole = total if weighted else float(total > 0)
        return RankCurve(site, method, tuple(ranks), costs, _falling(errors, ranks), whole)
    felt = _falling(errors * coherence.at(errors / (total or 1.0)), ranks)
    total *= float(coherence.at(errors.new_ones(1)))
    return RankCurve(site, method, tuple(ranks), costs, felt, total)


def _falling(errors: Tensor, ranks: Sequence[Rank]) -> tuple[float, ...]:
    """Errors that never grow with a whole rank; on other samples a larger rank may by chance have a larger error."""
    if all(isinstance(rank, int) for rank in ranks):
        errors = torch.cummin(errors, 0).values
    return tuple(errors.tolist())


def _exchanged(curves: list[RankCurve], world: World) -> list[RankCurve]:
    """Sum of the curves of all processes, which is exact: a curve is zero in all but the process that measured it."""
    if world.size == 1:
        return curves
    rows = [torch.tensor([*curve.errors, curve.energy]).double() for curve in curves]
    world.sum_(rows)
    return [
        replace(curve, errors=tuple(row[:-1].tolist()), energy=float(row[-1]))
        for curve, row in zip(curves, rows, strict=True)
    ]


def _mean_energy(curves: Sequence[RankCurve]) -> float:
    """Mean over the sites of the error of losing the whole output; 1 where all is zero."""
    energies = {curve.site.path: curve.energy for curve in curves}
    return sum(energies.values()) / max(len(energies), 1) or 1.0

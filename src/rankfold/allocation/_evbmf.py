"""As many ranks as a weight holds beside noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankfold.allocation._base import RankSelector, Table, cheaper, largest_fitting, pick, top_up, within
from rankfold.allocation._lagrangian import cheapest
from rankfold.allocation.curve import Option, Problem
from rankfold.checks import check_choice, check_number
from rankfold.decompositions import Decomposition, Spectrum
from rankfold.linalg.evbmf import evbmf
from rankfold.registry import register


@register("evbmf")
@dataclass(frozen=True)
class EVBMF(RankSelector):
    """The rank that variational Bayes finds in each matrix whose rank a method sets, weakened.

    Empirical variational Bayesian matrix factorisation takes a matrix for one of low rank and Gaussian noise, and finds
    the number of singular values above what noise alone would have (`rankfold.linalg.evbmf`). That is often far too few
    for a trained weight, so it is weakened: `r = r_full − w (r_full − r_EVB)`, with one `w` for all sites, rounded up
    to a candidate of the method. Of several methods at a site the one that then costs least is taken, since each keeps
    all that is no noise.

    Attributes:
        weaken: Strength `w` in (0, 1]: 1 is the rank that was found. None is the least at which the budget holds; ranks
            below those that were found, all by one factor, where it does not even hold at 1. With a number the rule is
            local: it does not look at the budget, which may be left out, and is an error where it does not hold.
        noise: What becomes of a site in which nothing but noise is found, as in a freshly initialised one: "skip"
            leaves it dense, "clamp" takes rank 1 for what was found.

    References:
        Nakajima, Sugiyama, Babacan, Tomioka, JMLR 14, 2013; Kim et al., arXiv 1511.06530, for Tucker-2. He, Jiang,
        Wu, arXiv 2408.16289, weaken it by a number that is guessed; here a budget finds it.
    """

    weaken: float | None = None
    noise: str = "skip"

    def __post_init__(self) -> None:
        if self.weaken is not None:
            law, cure = "a number in (0, 1], or None", "leave it out, or pass 0.8"
            check_number("EVBMF.weaken", self.weaken, law=law, cure=cure, high=1, open_low=True)
        check_choice("EVBMF.noise", self.noise, ("skip", "clamp"))

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Selector.reads`."""
        return ("spectra",)

    @property
    def local(self) -> bool:
        """See `RankSelector.local`."""
        return self.weaken is not None

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`."""
        table = Table.of(problem)
        found = [
            {method: ranks_of(spectra) for method in methods_of(options) if (spectra := spectra_at(problem, i, method))}
            for i, options in enumerate(problem.options)
        ]

        def choose(strength: float, factor: float = 1.0) -> list[int]:
            return [self._option(problem, table, i, own, strength, factor) for i, own in enumerate(found)]

        if self.weaken is not None:
            return within(self, problem, pick(problem, choose(self.weaken)))
        smallest = cheapest(problem, table)

        def at(t: float) -> list[int]:
            if t <= 0:
                return smallest
            return choose(2 * (1 - t)) if t >= 0.5 else choose(1.0, 2 * t)

        chosen = largest_fitting(problem, at)
        return pick(problem, top_up(table, smallest if chosen is None else chosen))

    def _option(
        self,
        problem: Problem,
        table: Table,
        site: int,
        found: dict[Decomposition, list[tuple[int, int]]],
        strength: float,
        factor: float,
    ) -> int:
        """Position of the cheapest option that keeps the wanted ranks; the dense one where none is smaller."""
        best = 0
        for method, parts in found.items():
            if self.noise == "skip" and any(rank == 0 for rank, _ in parts):
                continue
            wanted = [math.ceil(factor * (full - strength * (full - max(rank, 1)))) for rank, full in parts]
            for k, option in enumerate(problem.options[site]):
                ranks = option.rank if isinstance(option.rank, tuple) else (option.rank,)
                fits = option.method == method and len(ranks) == len(wanted)
                if fits and all(mine is not None and mine >= least for mine, least in zip(ranks, wanted, strict=True)):
                    best = cheaper(table, site, best, k)
        return best


def methods_of(options: Sequence[Option]) -> list[Decomposition]:
    """The methods among some options, each once."""
    return list(dict.fromkeys(option.method for option in options if option.method is not None))


def spectra_at(problem: Problem, site: int, method: Decomposition) -> tuple[tuple[Spectrum, ...], ...]:
    """Spectra of a method at a site, one tuple per group."""
    return problem.spectra.get((problem.sites[site].path, method), ())


def ranks_of(spectra: Sequence[Sequence[Spectrum]]) -> list[tuple[int, int]]:
    """The rank found in each matrix, the largest over the groups, and its full rank; 0 where all is noise."""
    parts = []
    for matrices in zip(*spectra, strict=True):
        ranks = [evbmf(each.values, each.rows, each.columns).rank for each in matrices]
        parts.append((max(ranks), max(len(each.values) for each in matrices)))
    return parts

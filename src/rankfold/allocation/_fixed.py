"""Ranks that the caller names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from rankfold.allocation._base import RankSelector, within
from rankfold.allocation._evbmf import methods_of
from rankfold.allocation.curve import Option, Problem
from rankfold.cost.formula import site_cost
from rankfold.errors import OptionError, near_matches
from rankfold.factors import Rank
from rankfold.registry import PLAIN, register


@register("fixed")
@dataclass(frozen=True)
class Fixed(RankSelector):
    """The rank of each site by its path, or by a pattern of paths such as `"layer1.*.conv2"`; all others stay dense.

    The first pattern that matches a site is the one that counts. Of several methods that admit the rank there, the one
    of least error is taken. The rule is local: a budget may be left out, and is an error where the ranks do not keep
    it.

    Attributes:
        ranks: Rank by path or pattern: a whole number, or a list of them for methods with several ranks (Tucker-2).
    """

    ranks: Mapping[str, Any] = field(default_factory=dict, metadata={PLAIN: True})

    def __post_init__(self) -> None:
        law = "a mapping from paths or patterns to ranks: whole numbers of at least 1, or lists of them"
        cure = 'try Fixed({"layer1.*": 16})'
        if not isinstance(self.ranks, Mapping) or not self.ranks:
            raise OptionError("Fixed.ranks", law=law, got=repr(self.ranks)[:80], cure=cure)
        own: dict[str, Rank] = {}
        for pattern, rank in self.ranks.items():
            parts = tuple(rank) if isinstance(rank, (list, tuple)) else (rank,)
            if not isinstance(pattern, str) or not parts or any(type(part) is not int or part < 1 for part in parts):
                raise OptionError("Fixed.ranks", law=law, got=f"{pattern!r}: {rank!r}"[:80], cure=cure)
            own[pattern] = parts if isinstance(rank, (list, tuple)) else rank
        object.__setattr__(self, "ranks", own)

    def __hash__(self) -> int:
        return hash(tuple(self.ranks.items()))

    @property
    def local(self) -> bool:
        """See `RankSelector.local`."""
        return True

    def select(self, problem: Problem) -> tuple[Option, ...]:
        """See `RankSelector.select`.

        Raises:
            OptionError: A pattern matches no site, or no method admits its rank at a site.
        """
        paths = [site.path for site in problem.sites]
        for pattern in self.ranks:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise OptionError(
                    "Fixed.ranks",
                    law="every pattern matches a site",
                    got=repr(pattern),
                    cure=near_matches(pattern, paths),
                )
        chosen = []
        for i, path in enumerate(paths):
            rank = next((rank for pattern, rank in self.ranks.items() if fnmatchcase(path, pattern)), None)
            chosen.append(problem.options[i][0] if rank is None else _option(problem, i, rank))
        return within(self, problem, tuple(chosen))


def _option(problem: Problem, site: int, rank: Rank) -> Option:
    """The option of least error at a rank; of a method with a grid of ranks one may also lie between two of them."""
    options, place = problem.options[site], problem.sites[site]
    exact = [option for option in options if option.rank == rank]
    if exact:
        return min(exact, key=lambda option: option.error)
    shape = place.geometry.canonical_shape
    between = []
    for method in methods_of(options):
        above = [option for option in options if option.method == method and _at_least(option.rank, rank)]
        if above and method.admits(shape, rank):
            nearest = min(above, key=lambda option: option.cost.params)
            between.append(replace(nearest, rank=rank, cost=site_cost(place, method.form, rank)))
    if not between:
        least = sorted({str(option.rank) for option in options if option.method is not None}, key=lambda t: (len(t), t))
        raise OptionError(
            f"Fixed.ranks at {place.path!r}",
            law="a rank that some method admits there, and that makes the layer smaller",
            got=repr(rank),
            cure=f"choose one between {least[0]} and {least[-1]}" if least else "leave the site out",
        )
    return min(between, key=lambda option: option.error)


def _at_least(rank: Rank | None, least: Rank) -> bool:
    """Whether a rank is nowhere below another of as many parts."""
    if isinstance(rank, tuple) and isinstance(least, tuple):
        return len(rank) == len(least) and all(a >= b for a, b in zip(rank, least, strict=True))
    return isinstance(rank, int) and isinstance(least, int) and rank >= least

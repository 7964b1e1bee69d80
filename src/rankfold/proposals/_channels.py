"""Plans that remove channels: alone, and with the families that have ranks for the rest of the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rankfold.allocation import Lagrangian, RankSelector, Uniform
from rankfold.channels.widths import HALF_WAY, SIZES, WidthSelector
from rankfold.decompositions import Decomposition, Family, Interpolative
from rankfold.distributed import world
from rankfold.errors import SiteError
from rankfold.proposals._base import Asked, Basis, Proposal, Proposer, proposes
from rankfold.proposals._remover import Remover
from rankfold.registry import name_of


@dataclass(frozen=True)
class ChannelWay:
    """A way to remove channels.

    Attributes:
        name: What the proposal is called.
        share: Of the way to the budget that channels go; ranks go the rest.
        sizes: Chooses how many units of each group stay.
        selector: Chooses the ranks.
        always: As of a `Proposal`.
    """

    name: str
    share: float
    sizes: WidthSelector
    selector: RankSelector
    always: bool


@proposes(Interpolative)
class ChannelProposer(Proposer):
    """Channels all the way, and half of it with ranks for the rest."""

    def __init__(self, basis: Basis, families: Sequence[Family]) -> None:
        super().__init__(basis, families)
        self._removers: dict[tuple[Interpolative, frozenset[str]], Remover | None] = {}

    def proposals(self, asked: Asked) -> list[Proposal]:
        """Of each family of its kind, each way."""
        forms = [family for family in self.basis.families if isinstance(family, Decomposition)]
        ways = channel_ways(
            asked.selector if isinstance(asked.selector, RankSelector) else None,
            asked.selector if isinstance(asked.selector, WidthSelector) else None,
            ranks=bool(forms),
        )
        found = []
        for method in self.families:
            if not isinstance(method, Interpolative):
                continue
            remover = self._remover(method, ways, alone=not forms)
            if remover is None:
                continue
            for way in ways:
                make = partial(
                    remover.plan,
                    asked.budget,
                    share=way.share,
                    sizes=way.sizes,
                    families=forms,
                    selector=way.selector,
                    seed=self.basis.seed,
                    repair=asked.repair,
                    world=world(),
                )
                found.append(Proposal(way.name, make, always=way.always))
        return found

    def _remover(self, method: Interpolative, ways: Sequence[ChannelWay], *, alone: bool) -> Remover | None:
        """What all plans of a method share; None where no channels can be removed, and there are other families.

        Raises:
            SiteError: No channels can be removed, and there is nothing else.
        """
        key = method, frozenset(name for way in ways for name in way.sizes.reads)
        if key in self._removers:
            return self._removers[key]
        basis = self.basis
        try:
            remover = basis.clock.time(
                "curves",
                lambda: Remover.of(
                    basis.model,
                    basis.example,
                    basis.sites,
                    basis.stats,
                    method,
                    selectors=[way.sizes for way in ways],
                    seed=basis.seed,
                ),
            )
        except SiteError as cause:
            if alone:
                raise
            basis.notes.append(f"no channels were removed: {cause.got}")
            self._removers[key] = None
            return None
        self._removers[key] = remover
        return remover

    @classmethod
    def numbers(cls, families: Sequence[Family], *, ranks: int, chosen_by: bool, weighting: bool) -> tuple[int, int]:
        """See `Proposer.numbers`."""
        if ranks:
            many, few = (2 if chosen_by else 3), 2
        else:
            many = few = 1 if chosen_by else len(SIZES)
        return many * len(families), few * len(families)


def channel_ways(selector: RankSelector | None, sizes: WidthSelector | None, *, ranks: bool) -> list[ChannelWay]:
    """Ways to remove channels: all the way, and half of it with ranks for the rest; without ranks, by all selectors.

    Args:
        selector: Of ranks, the one that was named; None is each of the defaults.
        sizes: Of channels, the one that was named; None is each of the defaults.
        ranks: Whether there are families with ranks.
    """
    ranked = [Lagrangian(), Uniform()] if selector is None else [selector]
    if not ranks:
        tried = SIZES if sizes is None else {name_of(sizes): sizes}
        return [ChannelWay(f"channels, {name}", 1.0, each, ranked[0], True) for name, each in tried.items()]
    half = SIZES[HALF_WAY]
    mixed = [ChannelWay(f"channels + {name_of(each)}", 0.5, half, each, each is ranked[0]) for each in ranked]
    return [ChannelWay("channels", 1.0, half, ranked[0], True), *mixed]

"""The plans that are tried where no selector is named, and which of them are worth carrying out on all samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rankfold.channels.widths import HALF_WAY, SIZES, WidthSelector
from rankfold.errors import BudgetError
from rankfold.graph.lockstep import micro_batches
from rankfold.graph.trace import Batch, batch_size
from rankfold.plan import Plan
from rankfold.ranks import HalfWay, Lagrangian, RankSelector, Uniform
from rankfold.ranks.curve import Curves
from rankfold.registry import name_of
from rankfold.statistics.data import Part, joined

FINALISTS = 2  # so many of the plans tried on a part are carried out on all samples
FEWEST = 64  # samples of the part on which the others are
SPARSEST = 8  # the part has at least one sample in so many
LARGEST_BATCH = 128  # small batches of the part are put together up to this: a trial costs calls more than samples


@dataclass(frozen=True)
class Maker:
    """A way to a plan.

    Attributes:
        name: What the candidate is called.
        make: Makes the plan.
        always: Whether it is tried also where held-out samples are too few to choose among many.
    """

    name: str
    make: Callable[[], Plan]
    always: bool = True


def rank_makers(
    curves: Curves, selector: RankSelector | None, make: Callable[[Curves, RankSelector], Plan]
) -> list[Maker]:
    """Ways to cut ranks: by each selector with all families, with positions for independent, with each family alone.

    How errors add up within a sample is measured for one layer at a time. Where it is much the same everywhere (in
    residual networks) its noise costs more than it tells, so a plan that takes positions for independent is tried too.

    A family alone is among what all together may choose, and prices say it is no better. But prices are estimates, and
    where a layer's neighbours are cut too a family may do better alone than in the choice: so it is tried.

    Args:
        curves: Of all families.
        selector: The one that was named, which is then taken as it is; None is each of the defaults.
        make: A plan from curves and a selector.
    """
    if selector is not None:
        return [Maker(name_of(selector), partial(make, curves, selector))]
    methods = list(dict.fromkeys(curve.method for curve in curves))
    first = Lagrangian()
    makers = [Maker(name_of(each), partial(make, curves, each)) for each in (first, Uniform(), HalfWay())]
    if any(curve.independent is not None for curve in curves):
        makers.append(Maker(f"{name_of(first)}, independent", partial(make, curves.independent(), first), always=False))
    for method in methods if len(methods) > 1 else ():
        own = replace(curves, curves=tuple(curve for curve in curves if curve.method == method))
        makers.append(Maker(f"{name_of(first)}, {name_of(method)} alone", partial(make, own, first), always=False))
    return makers


@dataclass(frozen=True)
class ChannelWay:
    """A way to remove channels.

    Attributes:
        name: What the candidate is called.
        share: Of the way to the budget that channels go; ranks go the rest.
        sizes: Chooses how many units of each group stay.
        selector: Chooses the ranks.
        always: As of a `Maker`.
    """

    name: str
    share: float
    sizes: WidthSelector
    selector: RankSelector
    always: bool


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


def candidates_of(makers: Sequence[Maker], bounds: Mapping[str, int]) -> dict[str, Plan]:
    """The plans by name, equal ones once; one that cannot be made under the budget drops out while another can.

    Args:
        makers: Of the candidates; of two with one name the second gets a number.
        bounds: Of the budget, by resource.

    Raises:
        BudgetError: None can be made: that of the one that comes closest to the budget.
    """
    plans: dict[str, Plan] = {}
    failures: list[BudgetError] = []
    for maker in makers:
        try:
            plan = maker.make()
        except BudgetError as cause:
            failures.append(cause)
            continue
        if all((plan.decisions, plan.cuts) != (other.decisions, other.cuts) for other in plans.values()):
            name, number = maker.name, 1
            while name in plans:
                number += 1
                name = f"{maker.name} ({number})"
            plans[name] = plan

    def excess(failure: BudgetError) -> float:
        reached = [value / max(bounds[name], 1) for name, value in failure.smallest.items() if name in bounds]
        return max(reached, default=math.inf)

    if not plans and failures:
        raise min(failures, key=excess)
    return plans


def part_of(batches: Iterable[Batch], samples: int, *, held_out: int, processes: int) -> list[Batch] | None:
    """A part of the samples to try many plans on, or None where they are too few for that, and for many plans.

    Args:
        batches: All samples.
        samples: How many of those are fitted on.
        held_out: One sample in this many is not.
        processes: That share the batches; each needs one, so batches are cut where they are too few.
    """
    every = min(SPARSEST, samples // FEWEST)
    if every < 2:
        return None
    part = joined(Part(batches, every, held_out), LARGEST_BATCH)
    if len(part) < processes:
        size = max(1, sum(batch_size(batch) for batch in part) // processes)
        part = [piece for piece, _ in micro_batches(iter(part), size)]
    return part

"""Model of the time and memory that a compression takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from rankfold.allocation.measuring import methods_at
from rankfold.cost.rates import Rates
from rankfold.data.batches import Batch, batch_size, to_device
from rankfold.data.draws import enough_positions
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import HELD_OUT, held_out_among
from rankfold.decompositions import Decomposition, Family, WhitenedSVD
from rankfold.proposals import FamilyForecast, Outlook
from rankfold.repair import Lockstep
from rankfold.sites.site import Site, Sites
from rankfold.statistics.collect import PIECE
from rankfold.statistics.gradients import BATCH
from rankfold.statistics.size import CHUNK_BYTES, CHUNKS, ELEMENT, sizes_of
from rankfold.trials.trials import DENSER, FEWEST, FINALISTS, SPARSEST, WEAKER

TRIANGLE = 0.75  # share of a Gram's products that is computed
DIAL = 1 + 2 * 3  # solves of a site: for three levels of the ridge each half, and once all samples
HEAVIEST = 5  # number of sites that are named
TIMED_SAMPLES, TIMED_SECONDS = 32, 1.0  # most samples, and seconds, of the measurement of latency


@dataclass(frozen=True)
class SiteForecast:
    """Predicted time and memory of one layer.

    Attributes:
        path: Path of the layer.
        seconds: Seconds over all stages, for statistics, curves and repairs.
        bytes: Bytes of its moments while it is solved, including the statistics that are kept of it.
    """

    path: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Course:
    """Options of a compression that determine its cost.

    Attributes:
        families: Methods to choose from.
        statistics: Names of the statistics that are collected.
        repair: The repair, or None.
        plans: Number of plans of ranks and of channels that are made where many are tried.
        always: Number of plans that are made where few are tried.
        weighting: True if gradients are collected.
        positions: Largest number of positions per sample; None is all.
        enough: Number of positions per feature, over all samples, that suffices.
        limit: Largest number of bytes of the values that a repair carries; None is no limit.
    """

    families: Sequence[Family]
    statistics: Sequence[str]
    repair: Lockstep | None
    plans: int
    always: int
    weighting: bool
    positions: int | None
    enough: int
    limit: int | None = None

    @property
    def forms(self) -> list[Decomposition]:
        """The families that have ranks."""
        return [method for method in self.families if isinstance(method, Decomposition)]


class Predicted:
    """The model of a compression's time and memory; the arguments are those of `forecast_of`."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        sites: Sites,
        course: Course,
        rates: Rates,
        samples: int,
    ) -> None:
        self.sites, self.course, self.rates = sites, course, rates
        self.samples, self.held = samples, samples // held_out_among(samples)
        self.fit = samples - self.held
        self.forward = rates.forward(model, example)
        self.batch = batch_size(example)
        self.largest, self.together = _activations(model, example)
        every = min(SPARSEST, self.fit // FEWEST)
        parted = every >= 2 and course.repair is not None and sites.graph.static_batch is None
        plans = course.plans if every >= 2 and sites.graph.static_batch is None else course.always
        self.part = samples // every if parted and plans > FINALISTS else 0
        self.trials = plans if self.part else 0
        self.whole = FINALISTS if self.part else plans
        few = held_out_among(samples) < HELD_OUT
        self.weaker = list(WEAKER.values()) if few and plans > 1 and course.repair == Lockstep() else []
        self.by_site: dict[str, float] = {site.path: 0.0 for site in sites}
        self.outlook = Outlook(model, sites, rates, self.forward, self.batch, self._spent)
        self.sizes = sizes_of(sites, course.statistics, repaired=course.repair is not None)

    def seconds(self, traced: float, forecasts: Sequence[FamilyForecast]) -> dict[str, float]:
        """Predicted seconds by stage.

        Args:
            traced: Seconds that finding the sites took.
            forecasts: Forecasts of the families, one per kind.
        """
        course, forward = self.course, self.forward
        result = {"trace": traced}
        own = [self._spent(site, self._statistics(site)) for site in self.sites]
        result["statistics"] = forward * self.fit + sum(own)
        if course.weighting:
            result["gradients"] = self._gradients()
        for each in forecasts:
            for stage, seconds in each.seconds.items():
                result[stage] = result.get(stage, 0.0) + seconds
        judged = 2 * forward * self.held
        if course.repair is None:
            done = self.whole * (judged + sum(self._spent(site, self._solved(site)) for site in self.sites))
            result["apply"] = done
        else:
            result["repair"] = self.trials * (judged + self._walk(self.part, self.fit // DENSER, self.trials))
            repaired = self.whole + sum(repair is not None for repair in self.weaker)
            result["repair"] += repaired * (judged + self._walk(self.samples, self.samples, repaired))
            if None in self.weaker:
                result["apply"] = judged + sum(self._spent(site, self._solved(site)) for site in self.sites)
        result["latency"] = max(TIMED_SECONDS, 6 * forward * min(self.batch, TIMED_SAMPLES))
        return result

    def memory(self) -> dict[str, int]:
        """Predicted bytes by stage, of moments, patches and activations."""
        piece, moments = min(self.batch, PIECE), self.sizes
        kept = moments.statistics
        working = max((site.working for site in moments.sites), default=0)
        running = 3 * self.largest * piece
        chunks = CHUNKS * max((min(CHUNK_BYTES, piece * self._patches(site)) for site in self.sites), default=0)
        result = {"statistics": kept + chunks + running}
        if self.course.weighting:
            result["gradients"] = kept + moments.followed + 2 * self.together * min(self.batch, BATCH)
        result["curves"] = kept + working
        if self.course.repair is None:
            result["apply"] = kept + working + running
        else:
            carried = 6 * self.largest * self.samples
            carried = carried if self.course.limit is None else min(carried, self.course.limit)
            result["repair"] = kept + moments.solving + chunks + carried + 2 * self.sites.cost.bytes + running
        return result

    def heaviest(self) -> tuple[SiteForecast, ...]:
        """The sites that take most time, and those that take most memory."""
        needs = {size.path: size.statistics + size.repair + size.working for size in self.sizes.sites}
        slow = sorted(self.by_site, key=lambda path: -self.by_site[path])[:HEAVIEST]
        large = sorted(needs, key=lambda path: -needs[path])[:HEAVIEST]
        paths = dict.fromkeys([*slow[:3], *large[:2], *slow[3:]])
        return tuple(SiteForecast(path, self.by_site[path], needs[path]) for path in [*paths][:HEAVIEST])

    def _patches(self, site: Site) -> int:
        """Bytes of a sample's patches, at the positions that a repair uses."""
        geometry = site.geometry
        wanted = enough_positions(geometry.features, 48, max(self.fit, 1))
        return 4 * geometry.groups * geometry.features * min(_positions(site), wanted)

    def _spent(self, site: Site, seconds: float) -> float:
        self.by_site[site.path] += seconds
        return seconds

    def _statistics(self, site: Site) -> float:
        if not self.course.statistics:
            return 0.0
        available = _positions(site)
        most = available if self.course.positions is None else min(available, self.course.positions)
        wanted = enough_positions(site.geometry.features, self.course.enough, self.fit)
        rows = self.fit * (most if self.course.positions is None else min(most, wanted))
        return self._moments(site, rows, self.fit / min(self.batch, PIECE), outputs=0)

    def _gradients(self) -> float:
        samples = min(256, self.fit)
        total = self.forward * (2 * 3 * samples + BATCH)
        for site in self.sites:
            geometry = site.geometry
            outputs, rows = geometry.canonical_shape[0], samples * _positions(site)
            rank = min(outputs, geometry.features)
            products = TRIANGLE * outputs**2 + rank * (2 * outputs + TRIANGLE * rank)  # Gram; both turned, and its Gram
            copied = self.rates.copy(geometry.groups * rows * (2 * outputs + 4 * rank))
            basis = geometry.groups * self.rates.decompose(WhitenedSVD(), (outputs, geometry.features))
            total += self._spent(site, self.rates.product(geometry.groups * rows * products) + copied + basis)
        return total

    def _moments(self, site: Site, rows: float, pieces: float, *, outputs: int) -> float:
        """Seconds of the products of patches, and of copying the patches themselves."""
        groups, features = site.geometry.groups, site.geometry.features
        products = self.rates.product(groups * rows * (TRIANGLE * features**2 + outputs * features))
        copied = groups * (2 * rows * (features + outputs) + 2 * pieces * features**2)
        return products + self.rates.copy(copied)

    def _methods(self, site: Site) -> list[Decomposition]:
        return methods_at(site, self.course.forms)

    def _solved(self, site: Site) -> float:
        """Seconds of the decomposition of a site, as the mean over the methods."""
        methods = self._methods(site)
        shape = site.geometry.canonical_shape
        each = sum(self.rates.decompose(method, shape) for method in methods) / max(len(methods), 1)
        return site.geometry.groups * each

    def _walk(self, samples: int, drawn_for: int, times: int) -> float:
        """Seconds of one pass of lockstep repair over some samples, with the check of the module."""
        if self.course.repair is None:
            raise TypeError("there is no repair")
        options, total = self.course.repair, self.forward * samples * (2 + self.held / max(self.samples, 1))
        for site in self.sites:
            geometry = site.geometry
            wanted = enough_positions(geometry.features, options.samples_per_feature, max(drawn_for, 1))
            rows = samples * min(_positions(site), wanted)
            own = self._moments(site, rows, 2 * samples / options.batch, outputs=geometry.canonical_shape[0])
            own += geometry.groups * DIAL * self.rates.solve(geometry.features) + 2 * self._solved(site)
            self._spent(site, own * times)
            total += own
        return total


def _positions(site: Site) -> int:
    """Positions of a sample at a site, over all its calls."""
    geometry = site.geometry
    return sum(count * (prod(geometry.output_size(size)) if size else 1) for size, count in site.calls) or 1


def _activations(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Bytes per sample of the largest output of a layer, and of the outputs of all layers together."""
    sizes: list[int] = []

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * max(output.element_size(), 4))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        with evaluating(model):
            run(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    samples = batch_size(batch)
    return max(sizes, default=ELEMENT) // samples, sum(sizes) // samples

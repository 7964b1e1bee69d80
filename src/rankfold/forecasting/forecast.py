"""Forecast of the time and memory that a compression takes and the sizes it can reach, before it is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from rankfold.cost.rates import Rates
from rankfold.cost.resources import Cost
from rankfold.data.batches import Batch, batch_size
from rankfold.data.running import device_of
from rankfold.data.splits import first_of, sample_count
from rankfold.errors import bytes_shown
from rankfold.forecasting.prediction import Course, Predicted, SiteForecast
from rankfold.forecasting.smallest import reach_of
from rankfold.proposals import family_forecasts
from rankfold.serialization import canonical_json
from rankfold.sites.reach import Blocker
from rankfold.sites.site import Sites

VERSION = 1


@dataclass(frozen=True)
class Forecast:
    """Predicted time and memory of `compress`, and the sizes it can reach; from `compress(..., dry_run=True)`.

    Seconds are modelled from one timed forward pass, and from products, factorisations and methods timed on this
    machine. At 0.7 of the parameters on one of two busy cores (`python -m benchmarks.forecast`) the total was 0.72 of
    the true time on a ResNet-20 (512 images), 0.66 on MobileNetV1 (100 photographs) and 1.23 on MiniLM-L6 (128
    sentences), and memory 0.67, 0.83 and 0.78 of the true one; stages that take long were off by a factor of up to two.
    Plans that turn out equal are tried once, so the number of trials is an upper bound.

    Attributes:
        model: Class of the model.
        samples: Calibration samples, held-out ones included.
        seconds: Predicted wall-clock seconds, by the stages of `Report.seconds`.
        memory: Predicted bytes above model and data, by stage; the peak is the largest.
        trials: Number of plans tried on a part of the samples, and number of plans carried out on all of them.
        sites: The layers that take most time, and those that take most memory.
        original: Cost of the model.
        bounds: The budget, as whole-model values by resource.
        smallest: Smallest whole-model value that can be reached, by resource.
        cuttable: Share of the model in layers that can be cut, 0 to 1, by resource.
        blockers: Modules that are made no smaller and hold most of the parameters, the largest first.
        notes: Remarks for the reader.
    """

    model: str
    samples: int
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    trials: tuple[int, int]
    sites: tuple[SiteForecast, ...]
    original: Cost
    bounds: Mapping[str, int]
    smallest: Mapping[str, int]
    cuttable: Mapping[str, float]
    blockers: tuple[Blocker, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def total_seconds(self) -> float:
        """Predicted seconds of all stages together."""
        return sum(self.seconds.values())

    @property
    def peak_memory(self) -> int:
        """Largest predicted bytes of any stage."""
        return max(self.memory.values(), default=0)

    @property
    def unreachable(self) -> tuple[str, ...]:
        """Resources whose bound is below the smallest that can be reached."""
        return tuple(name for name, bound in self.bounds.items() if bound < self.smallest[name])

    def to_json(self) -> str:
        """Canonical JSON text."""
        value: dict[str, Any] = asdict(self)
        value.update(version=VERSION, total_seconds=self.total_seconds, peak_memory=self.peak_memory)
        value["unreachable"] = list(self.unreachable)
        return canonical_json(value)

    def text(self) -> str:
        """The forecast as plain text."""
        whole = self.original.amounts()
        tried, carried = self.trials
        lines = [f"{self.model}, {self.samples} samples: about {_time(self.total_seconds)}, "]
        lines[0] += f"{bytes_shown(self.peak_memory)} above model and data"
        lines.append(f"  {tried} plans tried on a part of the samples, {carried} carried out on all")
        for stage, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            memory = f", {bytes_shown(self.memory[stage])}" if stage in self.memory else ""
            lines.append(f"  {stage}: {_time(seconds)}{memory}")
        lines.append("layers that take most:")
        lines += [f"  {each.path}: {_time(each.seconds)}, {bytes_shown(each.bytes)}" for each in self.sites]
        for name, asked in self.bounds.items():
            reached = self.smallest[name]
            word = "NOT reachable" if name in self.unreachable else "reachable"
            lines.append(
                f"{name}: {asked:,} of {whole[name]:,} asked for, {word}; the smallest is {reached:,} "
                f"({reached / max(whole[name], 1):.3f}), {self.cuttable[name]:.0%} lie in layers that can be cut"
            )
        if self.blockers:
            lines.append("what stays at the smallest, of the parameters:")
            lines += [f"  {each.path or '(the model)'}: {each.share:.1%} ({each.reason})" for each in self.blockers]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        """Same as `text`."""
        return self.text()


def forecast_of(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sites,
    course: Course,
    *,
    traced: float,
    bounds: Mapping[str, int],
) -> Forecast:
    """Predict a compression from its sites, with a few forward passes of one batch.

    Args:
        model: The model; left as it was.
        batches: The calibration data; samples are counted, and one batch is run.
        sites: Sites of the model, those whose moments fit into memory.
        course: Options of the compression that determine its cost.
        traced: Seconds that finding the sites took.
        bounds: The budget, as whole-model values.
    """
    example = first_of(batches)
    rates, samples = Rates(device_of(model)), sample_count(batches)
    samples = sum(batch_size(batch) for batch in batches) if samples is None else samples
    predicted = Predicted(model, example, sites, course, rates, samples)
    forecasts = family_forecasts(predicted.outlook, course.families)
    seconds, memory = predicted.seconds(traced, forecasts), predicted.memory()
    reach = reach_of(model, sites, forecasts)
    notes = [f"no graph, so no lockstep repair: {sites.graph.reason}"] if sites.graph.reason else []
    return Forecast(
        sites.model,
        samples,
        seconds,
        memory,
        (predicted.trials, predicted.whole + len(predicted.weaker)),
        predicted.heaviest(),
        sites.cost,
        dict(bounds),
        reach.smallest,
        reach.cuttable,
        reach.blockers,
        tuple(notes),
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

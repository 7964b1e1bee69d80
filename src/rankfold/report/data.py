"""The report as data."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from rankfold._version import __version__
from rankfold.comparison.compare import Comparison
from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import Cost
from rankfold.errors import CheckpointError, shown
from rankfold.plan import Plan
from rankfold.plan.making import decision_cost, plan_cost
from rankfold.report.signature import Signature
from rankfold.report.warnings import few, lost, slower
from rankfold.serialization import canonical_json, converted, parse_json, read_json
from rankfold.sites.site import Site, Sites

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One layer before and after.

    Attributes:
        path: Site path.
        kind: Layer kind.
        shape: Shape of the weight.
        form: Form of the factors, or "dense", or "skipped".
        method: The method, or "".
        rank: The rank, or None.
        before: Cost before; None for a skipped layer.
        after: Cost after; None for a skipped layer.
        why: Reason of the decision, or of the skip.
        error: The decision's predicted error; None where there is none.
        held_out: Relative error of the layer's output on held-out samples, without the repair and as it was installed;
            None where no repair was solved.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    form: str
    method: str
    rank: int | tuple[int, ...] | None
    before: Cost | None
    after: Cost | None
    why: str
    error: float | None = None
    held_out: tuple[float, float] | None = None


@dataclass(frozen=True)
class Candidate:
    """One plan that was tried, as judged on held-out inputs.

    Attributes:
        selector: Name of the way in which the plan was made.
        divergence: Divergence of the model's outputs, by the kind of each (`Comparison.divergence`).
        agreement: Share of equal decisions; None where no output is logits.
        taken: True if it is the plan that is returned.
        samples: Number of samples on which it was carried out, held-out ones included; None for all.
    """

    selector: str
    divergence: float
    agreement: float | None
    taken: bool
    samples: int | None = None


@dataclass(frozen=True)
class Report:
    """Report of a compression: every layer, costs, comparison, candidates and time.

    Attributes:
        model: Class of the model.
        rows: Rows of every site, then of every skip.
        before: Cost of the original.
        after: Cost of the compressed model, counted on the live module.
        budget: Bounds that the compression was given.
        latency: Measured kept fraction of the latency (above 1 is slower), or None.
        comparison: Comparison on held-out calibration inputs, or None.
        candidates: Plans that were tried; one that was tried on a part of the samples and carried out on all is there
            twice.
        seconds: Wall-clock seconds a stage.
        notes: Remarks for the reader: the way that was taken, and steps that could not be done.
        seed: The seed.
        environment: Versions and machine.
        latency_spread: Lower and upper quartile of the measured latency's ratios, or None.
        held_out: True if the comparison and the candidates are on samples that nothing was fitted on.
        samples: Number of calibration samples that were fitted on, or None.
        inputs: Signature of the model's inputs, or None.
        details: Remarks on the repair: how exactly the module equals what was computed, and where it was not used.
    """

    model: str
    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    budget: Mapping[str, float | int]
    latency: float | None = None
    comparison: Comparison | None = None
    candidates: tuple[Candidate, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    latency_spread: tuple[float, float] | None = None
    held_out: bool = True
    samples: int | None = None
    inputs: Signature | None = None
    details: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines that a reader must not miss: on lost agreement, then on few samples, then on longer time."""
        return (
            *lost(self.comparison, held_out=self.held_out),
            *few(self.samples, held_out=self.held_out),
            *slower(self.latency, self.latency_spread),
        )

    def to_json(self) -> str:
        """Canonical JSON text."""
        value: dict[str, Any] = asdict(self)
        value["version"] = VERSION
        value["warnings"] = list(self.warnings)
        return canonical_json(value)

    @classmethod
    def from_json(cls, text: str, *, place: str = "report") -> Report:
        """Read what `to_json` wrote, with this release or an earlier one.

        Raises:
            CheckpointError: The text is malformed, or of another version; the place is named.
        """
        return cls._read(parse_json(text, place=place), place)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read the report.json of a checkpoint; see `from_json`."""
        return cls._read(read_json(Path(path)), str(path))

    @classmethod
    def _read(cls, value: Any, place: str) -> Report:
        if not isinstance(value, dict) or type(value.get("version")) is not int or value["version"] != VERSION:
            raise CheckpointError(
                place,
                law=f"a report of version {VERSION}",
                got=shown(value.get("version") if isinstance(value, dict) else value),
                cure="read it with the release that wrote it",
            )
        return converted(value, cls, place=place)

    def text(self) -> str:
        """A dozen lines of plain text: the budget, the result, and its cost in decisions and time."""
        from rankfold.report.text import render

        return render(self)

    def table(self, *, width: int = 110) -> str:
        """Every layer before and after, what was left alone and why, and all plans that were tried, as plain text."""
        from rankfold.report.table import render_layers

        return render_layers(self, width=width)

    def __str__(self) -> str:
        """The same as `text`."""
        return self.text()


def rows(
    sites: Sites,
    plan: Plan,
    narrowed: Sequence[Site] | None = None,
    errors: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Row, ...]:
    """Rows of every site and skip under a plan.

    Args:
        sites: Sites of the original.
        plan: The plan.
        narrowed: The same sites as the plan's cuts of channels leave them; None where it has none.
        errors: Errors of the sites that a repair solved, on held-out samples, (without it, as installed), by path.
    """
    result = []
    for site, left in zip(sites, sites if narrowed is None else narrowed, strict=True):
        decision = plan.at(site.path)
        fewer = decision.method is None and left.geometry != site.geometry
        result.append(
            Row(
                site.path,
                site.kind,
                site.weight_shape,
                "channels" if fewer else decision.form,
                "" if decision.method is None else str(decision.method),
                decision.rank,
                dense_cost(site),
                decision_cost(left, decision),
                decision.why,
                decision.error,
                (errors or {}).get(site.path),
            )
        )
    decided = {site.path for site in sites}
    kept = [skip for skip in plan.skips if skip.path in decided]  # sites whose output channels must stay
    skipped = [Row(skip.path, "", (), "skipped", "", None, None, None, skip.reason) for skip in (*sites.skips, *kept)]
    return (*result, *skipped)


def predicted(sites: Sites, plan: Plan) -> Cost:
    """Cost of the compressed model by formula."""
    return plan_cost(sites, plan)


def environment() -> dict[str, str]:
    """Versions that numbers depend on."""
    return {
        "rankfold": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }

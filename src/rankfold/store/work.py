"""A directory that keeps what is finished, so that a run that was killed goes on where it stood, to the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold._version import __version__
from rankfold.allocation.curve import Curves, RankCurve
from rankfold.cost.formula import site_cost
from rankfold.data.batches import Batch
from rankfold.data.running import device_of
from rankfold.data.splits import digest
from rankfold.decompositions import Decomposition, Family
from rankfold.errors import CheckpointError, WorkDirError
from rankfold.plan import Plan
from rankfold.registry import to_json
from rankfold.repair.site import Recall, always_solve
from rankfold.repair.solved import SolvedSites
from rankfold.serialization import canonical_json, read_json, write_file
from rankfold.sites.site import Sites
from rankfold.statistics import Statistics
from rankfold.store.results import T, kept_result

VERSION = 5  # 2: moments in halves; 3: coherence for every rank; 4: Fisher metric of logits; 5: measured scales
HEAD, CURVES, PLANS, RESULTS = "work.json", "curves.json", "plans", "results"


def facts_of(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Batch],
    *,
    families: Sequence[Family],
    weighting: bool,
    positions: int | None,
    seed: int,
) -> dict[str, Any]:
    """Everything that statistics, gradients and curves depend on, which excludes budget, selector and repair."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    data, number = hashlib.sha256(), 0
    for number, batch in enumerate(batches, start=1):  # noqa: B007 - counted
        data.update(digest(batch))
    return {
        "version": VERSION,
        "model": sites.model,
        "structure": sites.fingerprint,
        "weights": digest(tensors).hex(),
        "data": data.hexdigest(),
        "batches": number,
        "sites": [site.path for site in sites],
        "families": [to_json(family) for family in families],
        "weighting": weighting,
        "positions": positions,
        "seed": seed,
        "device": device_of(model).type,
        "rankfold": __version__,
        "torch": torch.__version__,
    }


class Work:
    """Store of the finished work on one model, data set and set of options. Without a folder nothing is kept.

    Every file appears whole or not at all and is checked when it is read; a damaged one counts as missing. One process
    at a time may use a folder.

    Args:
        folder: An existing folder, or None.
        device: Device on which the statistics are needed.
    """

    def __init__(self, folder: Path | None = None, device: torch.device | None = None) -> None:
        self._folder, self._device = folder, device

    @classmethod
    def open(cls, path: str | Path, facts: Mapping[str, Any], device: torch.device) -> Work:
        """Open a work folder, or make a new one.

        Args:
            path: A new or empty directory, or one of an earlier run.
            facts: Facts from `facts_of`.
            device: Device on which the statistics are needed.

        Raises:
            WorkDirError: The directory holds other files, or the work of another model, other data or options; what
                differs is named.
            WriteError: The directory cannot be written.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise _refusal(folder, law="work_dir is a directory", got="a file")
        if (folder / HEAD).exists():
            _check(folder, facts)
        else:
            others = (
                [each.name for each in sorted(folder.iterdir()) if not _is_scratch(each)] if folder.exists() else []
            )
            if others:
                raise _refusal(folder, law="work_dir is new, empty, or of an earlier run", got=f"{others[0]!r} in it")
            write_file(folder / HEAD, canonical_json(dict(facts)).encode())
        for each in [*folder.iterdir(), *folder.glob(f"{RESULTS}/.*")]:  # files that a killed run was writing
            if _is_scratch(each) or each.parent.name == RESULTS:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        return cls(folder, device)

    def statistics(self, collect: Callable[[], Statistics]) -> Statistics:
        """The statistics: read from the folder, or collected now."""
        return collect() if self._folder is None else self._kept("statistics", collect)

    def gradients(self, stats: Statistics, collect: Callable[[], str | None], name: str = "gradients") -> str | None:
        """Add the gradient Grams to the statistics: read from the folder, or collected now.

        Args:
            stats: Statistics, changed as `collect` changes them.
            collect: Function that adds the statistics of gradients to `stats`; it returns the reason why there are
                none, or None.
            name: Name of what is collected, which the folder keeps it by.
        """
        if self._folder is None:
            return collect()
        before = {path: set(own) for path, own in stats.sites.items()}
        known = set(stats.manifest)

        def added() -> Statistics:
            why = collect()
            sites = {
                path: {name: own[name] for name in own if name not in before[path]} for path, own in stats.sites.items()
            }
            manifest = {name: value for name, value in stats.manifest.items() if name not in known}
            return Statistics(sites, {"added": manifest, "why": why}, stats.fingerprint)

        kept = self._kept(name, added)
        for path, own in kept.sites.items():
            stats.sites[path].update(own)
        stats.manifest.update(kept.manifest["added"])
        why: str | None = kept.manifest["why"]
        return why

    def curves(self, sites: Sites, families: Sequence[Decomposition], measure: Callable[[], Curves]) -> Curves:
        """The curves: read from the folder, or measured now."""
        if self._folder is None:
            return measure()
        kept = self._read_curves(self._folder / CURVES, sites, families)
        if kept is not None:
            return kept
        curves = measure()
        rows = [
            {
                "site": curve.site.path,
                "family": families.index(curve.method),
                "ranks": list(curve.ranks),
                "errors": list(curve.errors),
                "energy": curve.energy,
            }
            for curve in curves
        ]
        head = {
            "sha256": _sha256(rows),
            "families": [to_json(method) for method in families],
            "curves": rows,
            "unit": curves.unit,
        }
        write_file(self._folder / CURVES, canonical_json(head).encode())
        return curves

    def sites(self, model: nn.Module, plan: Plan) -> Recall:
        """The function by which a lockstep pass of a plan gets a solved site: from the folder, or solved and kept."""
        if self._folder is None:
            return always_solve
        text = plan.to_json()
        folder = self._folder / PLANS / hashlib.sha256(text.encode()).hexdigest()[:32]
        write_file(folder / "plan.json", text.encode())
        return SolvedSites(folder, dict(model.named_modules(remove_duplicate=False)), plan)

    def result(self, plan: Plan, part: str, kind: type[T], work: Callable[[], T]) -> T:
        """The result of a plan on some of the samples: read from the folder, or computed now; see `kept_result`.

        Args:
            plan: The plan.
            part: Name of the set of samples.
            kind: Dataclass of the result.
            work: Function that carries the plan out.
        """
        if self._folder is None:
            return work()
        key = hashlib.sha256(f"{part}\n{plan.to_json()}".encode()).hexdigest()[:32]
        return kept_result(self._folder / RESULTS / f"{key}.json", kind, work)

    def _kept(self, name: str, collect: Callable[[], Statistics]) -> Statistics:
        """Statistics from the folder; those collected now are written and read too, so that both are alike."""
        if self._folder is None:
            raise TypeError("there is no folder")
        path = self._folder / name
        try:
            stats = Statistics.load(path)
        except CheckpointError:
            collect().save(path, overwrite=True)
            stats = Statistics.load(path)
        for own in stats.sites.values():
            for statistic in own.values():
                for name in ("total", "first"):
                    value = getattr(statistic, name)
                    if value is not None:  # a copy: in memory of torch's own, aligned as it always is
                        setattr(statistic, name, value.clone().to(self._device))
        return stats

    def _read_curves(self, file: Path, sites: Sites, families: Sequence[Decomposition]) -> Curves | None:
        try:
            head = read_json(file)
            same = head["families"] == [to_json(method) for method in families]  # a selector may ask for multiples
            if head["sha256"] != _sha256(head["curves"]) or not same:
                return None
        except (CheckpointError, KeyError, TypeError):
            return None
        curves = []
        for row in head["curves"]:
            site, method = sites.at(row["site"]), families[row["family"]]
            ranks = tuple(tuple(rank) if isinstance(rank, list) else rank for rank in row["ranks"])
            costs = tuple(site_cost(site, method.form, rank) for rank in ranks)
            curves.append(RankCurve(site, method, ranks, costs, tuple(row["errors"]), row["energy"]))
        return Curves(sites, tuple(curves), unit=head.get("unit", 1.0))


def _check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder with the work on another model, other data or other options."""
    try:
        old = read_json(folder / HEAD)
    except CheckpointError as cause:
        raise _refusal(
            folder / HEAD, law="the file that says what the work is of can be read", got=cause.got
        ) from cause
    new = json.loads(canonical_json(dict(facts)))
    if not isinstance(old, dict):
        raise _refusal(folder / HEAD, law="a JSON object", got=repr(old)[:60])
    different = [name for name in dict.fromkeys([*facts, *old]) if old.get(name) != new.get(name)]
    if different:
        got = "; ".join(_difference(name, old.get(name), new.get(name)) for name in different)
        raise _refusal(folder, law="the work there is of the same model, data and options", got=got)


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "sites" and isinstance(old, list):
        gone, come = [path for path in old if path not in new], [path for path in new if path not in old]
        return "sites: " + ", ".join(
            [f"without {path!r}" for path in gone[:3]] + [f"with {path!r}" for path in come[:3]]
        )
    if name in ("structure", "weights", "data"):
        return f"{name}: SHA-256 {str(new)[:12]} where the work is of {str(old)[:12]}"
    return f"{name}: {_shown(new)} where the work is of {_shown(old)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "…"


def _refusal(path: Path, *, law: str, got: str) -> WorkDirError:
    return WorkDirError(
        str(path),
        law=law,
        got=got,
        cure="pass another work_dir, remove this one, or go back to what the work was begun with (batches that are "
        "shuffled or drawn anew at every pass are other data each time)",
    )


def _is_scratch(path: Path) -> bool:
    return path.name.startswith((f".{HEAD}.", f".{CURVES}.", ".statistics.", ".gradients."))


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

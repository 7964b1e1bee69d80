"""All statistics of all sites, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from rankfold.decompositions import Moments
from rankfold.errors import CheckpointError, DataError, RegistryError
from rankfold.graph.sites import Site
from rankfold.linalg.whitening import shrunk
from rankfold.registry import lookup
from rankfold.serialization import canonical_json, read_json, sha256_file, write_directory, write_text
from rankfold.statistics._base import Statistic, merge

VERSION = 1


@dataclass(eq=False)
class Statistics:
    """What was collected, by site path and name of the statistic.

    Attributes:
        sites: Site path to the site's statistics by name.
        manifest: What they were collected over: samples, batches, SHA-256 of the data, seed, positions.
        fingerprint: Of the model.
    """

    sites: dict[str, dict[str, Statistic]]
    manifest: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def moments(self, site: Site, group: int) -> Moments:
        """Averages of one group of a site, the Grams shrunk for their number of samples, ready for a decomposition."""
        own = self.sites.get(site.path, {})

        def average(name: str) -> torch.Tensor | None:
            return own[name].mean()[group] if name in own else None

        gram, mean = average("input-gram"), average("input-mean")
        if gram is not None:
            gram = shrunk(gram, mean, own["input-gram"].count)
        return Moments(
            gram,
            mean,
            average("output-gram"),
            site.geometry.bias,
            self.gradient_gram(site.path, group),
        )

    def gradient_gram(self, path: str, group: int) -> torch.Tensor | None:
        """The output weighting of a site, or None where no gradients were collected.

        Shrunk for its number of samples: 256 random directions say little about the 1000 outputs of a classifier, and
        unshrunk they would make 744 of them free.
        """
        statistic = self.sites.get(path, {}).get("gradient-gram")
        return None if statistic is None else shrunk(statistic.mean()[group], None, statistic.count)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics over the data of both.

        Raises:
            DataError: They are of two models, or hold different sites or statistics.
        """
        mine = {path: set(own) for path, own in self.sites.items()}
        theirs = {path: set(own) for path, own in other.sites.items()}
        if self.fingerprint != other.fingerprint or mine != theirs:
            raise DataError(
                "statistics",
                law="both are of one model, with the same sites and statistics",
                got=f"{len(mine)} and {len(theirs)} sites of models {self.fingerprint[:8]} and {other.fingerprint[:8]}",
                cure="collect both with the same model and options",
            )
        sites = {
            path: {name: merge(own[name], other.sites[path][name]) for name in own} for path, own in self.sites.items()
        }
        manifest = dict(self.manifest)
        for key in ("samples", "batches"):
            manifest[key] = self.manifest.get(key, 0) + other.manifest.get(key, 0)
        manifest["sha256"] = [*_listed(self.manifest.get("sha256")), *_listed(other.manifest.get("sha256"))]
        return Statistics(sites, manifest, self.fingerprint)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `statistics.json` and `statistics.safetensors` into a directory, whole or not at all."""
        tensors = {
            f"{site}\t{name}": statistic.total.contiguous()
            for site, own in self.sites.items()
            for name, statistic in own.items()
            if statistic.total is not None
        }
        counts = {site: {name: statistic.count for name, statistic in own.items()} for site, own in self.sites.items()}
        head: dict[str, Any] = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "manifest": self.manifest,
            "counts": counts,
        }

        def write_tensors(file: Path) -> None:
            save_file(tensors, file)
            head["sha256"] = sha256_file(file)

        write_directory(
            Path(path),
            {
                "statistics.safetensors": write_tensors,
                "statistics.json": lambda file: write_text(canonical_json(head))(file),
            },
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CheckpointError: A file is missing, truncated, altered, or of another version.
        """
        folder = Path(path)
        head = read_json(folder / "statistics.json")
        file = folder / "statistics.safetensors"
        if not isinstance(head, Mapping) or head.get("version") != VERSION:
            raise CheckpointError(
                str(folder), law=f"statistics of version {VERSION}", got=repr(head)[:60], cure="collect them again"
            )
        if not file.exists() or sha256_file(file) != head.get("sha256"):
            raise CheckpointError(
                str(file),
                law="the file has the checksum noted beside it",
                got="a missing, truncated or altered file",
                cure="collect the statistics again",
            )
        tensors = load_file(file)
        try:
            sites = {
                site: {
                    name: cast(type[Statistic], lookup(name, Statistic))(int(count), tensors.get(f"{site}\t{name}"))
                    for name, count in own.items()
                }
                for site, own in head["counts"].items()
            }
            return cls(sites, dict(head["manifest"]), str(head["fingerprint"]))
        except (KeyError, TypeError, ValueError, AttributeError, RegistryError) as cause:
            raise CheckpointError(
                str(folder / "statistics.json"),
                law="counts by site and registered statistic, a manifest and a fingerprint",
                got=f"{type(cause).__name__}: {cause}",
                cure="collect the statistics again",
            ) from cause


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]

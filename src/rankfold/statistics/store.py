"""All statistics of all sites, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from rankfold.decompositions import Moments
from rankfold.errors import CheckpointError, DataError, RegistryError
from rankfold.linalg.pooling import pooled
from rankfold.linalg.whitening import (
    correlations,
    covariance,
    scales_shrinkage,
    shrinkage,
    shrinkage_of,
    shrunk,
    with_even_scales,
)
from rankfold.registry import lookup
from rankfold.serialization import canonical_json, read_json, sha256_file, write_directory, write_text
from rankfold.sites.site import Site
from rankfold.statistics._base import Statistic, merge

VERSION = 2
READABLE = (1, 2)  # before 2 the halves of the samples were not distinguished


@dataclass(eq=False)
class Statistics:
    """Collected statistics, by site path and name of the statistic.

    Attributes:
        sites: Statistics by site path, and of a site by name.
        manifest: Record of what they were collected over: samples, batches, SHA-256 of the data, seed, positions.
        fingerprint: Fingerprint of the model.
    """

    sites: dict[str, dict[str, Statistic]]
    manifest: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def moments(self, site: Site, group: int, *, half: int | None = None, shrink: bool = True) -> Moments:
        """Averages of one group of a site, ready for a decomposition.

        Args:
            site: The site.
            group: The group.
            half: Index of a half of the samples, 0 or 1; None for all.
            shrink: True to shrink the input Gram for its number of samples (see `shrinkage_of`), which fitting needs;
                judging uses the Gram as it is.
        """
        if site.head is not None:
            return self._of_both_ends(site, site.head, half=half, shrink=shrink)
        own = self.sites.get(site.path, {})

        def average(name: str) -> torch.Tensor | None:
            if name not in own:
                return None
            return own[name].mean(half if own[name].halved else None, group=group)

        gram, mean = average("input-gram"), average("input-mean")
        if gram is not None and shrink:
            gram = shrunk(gram, mean, _shrinkage(own["input-gram"], own.get("input-mean"), group, half))
        return Moments(
            gram,
            mean,
            average("output-gram"),
            site.geometry.bias,
            self.gradient_gram(site.path, group, half=half, shrink=shrink),
            average("input-groups"),
        )

    def _of_both_ends(self, site: Site, head: Site, *, half: int | None, shrink: bool) -> Moments:
        """The moments of a table and of its head as those of one identity.

        With `D` the error of the identity, looking up loses `tr(G D A Dᵀ)`, with the second moment `A` of the vectors,
        and the head `tr(M Dᵀ H D) = tr(H D M Dᵀ)`, with the second moment `H` of its inputs and the Gram `M` of the
        gradients there. `pooled` makes one pair of both. Without gradients the moments are those of the vectors alone.
        """
        own, end = (
            self.moments(replace(each, head=None), 0, half=half, shrink=shrink)
            for each in (site, replace(head, geometry=site.geometry))
        )
        if own.gradient_gram is None or own.gram is None or end.gram is None or end.gradient_gram is None:
            return own
        weighting, gram = pooled([(own.gradient_gram, own.gram), (end.gram, end.gradient_gram)])
        return replace(own, gram=gram, gradient_gram=weighting)

    def has_halves(self, path: str) -> bool:
        """Whether the input moments of a site distinguish two halves of the samples."""
        own = self.sites.get(path, {})
        return all(name in own and own[name].has_halves for name in ("input-gram", "input-mean"))

    def gradient_gram(
        self, path: str, group: int, *, half: int | None = None, shrink: bool = True
    ) -> torch.Tensor | None:
        """The output weighting of a site, or None where no gradients were collected.

        It is shrunk for its number of samples: 256 random directions carry little information on the 1000 outputs of a
        classifier, and without shrinkage errors in 744 directions would count as nothing.
        """
        statistic = self.sites.get(path, {}).get("gradient-gram")
        if statistic is None:
            return None
        half = half if statistic.has_halves else None
        gram = statistic.mean(half, group=group)
        if not shrink:
            return gram
        gram = shrunk(gram, None, _shrinkage(statistic, None, group, half))
        if not statistic.has_halves:
            return gram
        of_half, of_all = scales_shrinkage(statistic.mean(0, group=group), statistic.mean(1, group=group))
        return with_even_scales(gram, of_all if half is None else of_half)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics over the data of both.

        Raises:
            DataError: The statistics are of two models, or hold different sites or statistics.
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
        tensors |= {
            f"{site}\t{name}\tfirst": statistic.first.clone(memory_format=torch.contiguous_format)
            for site, own in self.sites.items()
            for name, statistic in own.items()
            if statistic.first is not None
        }
        counts = {
            site: {name: [each.count, each.first_count] for name, each in own.items()}
            for site, own in self.sites.items()
        }
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
        if not isinstance(head, Mapping) or head.get("version") not in READABLE:
            raise CheckpointError(
                str(folder),
                law=f"statistics of version {' or '.join(map(str, READABLE))}",
                got=repr(head)[:60],
                cure="collect them again",
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
                    name: _statistic(name, count, tensors.get(f"{site}\t{name}"), tensors.get(f"{site}\t{name}\tfirst"))
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


def _shrinkage(gram: Statistic, mean: Statistic | None, group: int, half: int | None = None) -> float:
    """Shrinkage of a Gram, or of the covariance where there is a mean; by a formula where halves are not distinguished.

    Args:
        gram: Statistic of the Gram.
        mean: Statistic of the mean, or None.
        group: Index of the group.
        half: Index of a half of the samples, 0 or 1; None for all.
    """

    def seen(part: int | None) -> torch.Tensor:
        own = gram.mean(part, group=group)
        return covariance(own, None if mean is None else mean.mean(part, group=group))

    if not gram.has_halves or (mean is not None and not mean.has_halves):
        return shrinkage(correlations(seen(None))[0], gram.count)
    of_half, of_all = shrinkage_of(seen(0), seen(1))
    return of_all if half is None else of_half


def _statistic(name: str, counts: Any, total: torch.Tensor | None, first: torch.Tensor | None) -> Statistic:
    """A statistic from its tensors and counts on disk; before version 2 the count was one number."""
    count, first_count = counts if isinstance(counts, list) else (counts, 0)
    return cast(type[Statistic], lookup(name, Statistic))(int(count), total, int(first_count), first)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]

"""Memory that moments of a site's inputs and outputs take, known before the first forward."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from rankfold.errors import MemoryLimitError, bytes_shown
from rankfold.registry import lookup
from rankfold.sites.site import Site, Sites, Skip
from rankfold.statistics._base import Statistic
from rankfold.statistics._coherence import Coherence
from rankfold.statistics._gradients import GradientGram

ELEMENT = 8  # bytes of a float64, in which all moments are kept
SUMS = 2  # a statistic that distinguishes two halves of the samples keeps the sum over all, and over the first
PAIRS = 4  # a repair keeps its moments of two halves, of held-out samples, and of both halves together
WORKING = 4  # copies of a site's Gram while it is decomposed or solved: shrunk, scaled, its root, its factor
CHUNK_BYTES = 64 * 2**20  # most bytes of patches in memory at once
CHUNKS = 3  # chunks in memory at once: patches, those drawn for one half of the samples, and outputs
LARGEST_GRAM = 2**30  # most bytes of one Gram without a limit: 11,585 features, and 2 GB for both halves
SMALL_GRAM = 256 * 2**20  # a Gram up to this is never too large: 5,792 features
PROPORTION = 512  # a larger one has at most so many times the bytes of its layer's weight
TOO_WIDE = "too wide"


@dataclass(frozen=True)
class SiteSize:
    """Bytes that one site takes.

    Attributes:
        path: Path of the site.
        statistics: Bytes of the statistics that are collected at it and kept until the end.
        repair: Bytes of the moments of both networks while it is solved.
        working: Bytes of the copies made while it is decomposed or solved.
        followed: Bytes of the projections that follow its errors to the outputs, kept for all sites while gradients are
            collected.
    """

    path: str
    statistics: int
    repair: int
    working: int
    followed: int = 0


@dataclass(frozen=True)
class Sizes:
    """Bytes that a compression takes beside the network and its activations.

    Attributes:
        sites: Sizes, one a site.
        chunks: Bytes of chunks of patches.
    """

    sites: tuple[SiteSize, ...]
    chunks: int = CHUNKS * CHUNK_BYTES

    @property
    def statistics(self) -> int:
        """Bytes of the statistics that are kept of all sites together."""
        return sum(site.statistics for site in self.sites)

    @property
    def solving(self) -> int:
        """Bytes of the site that takes most while it is decomposed or solved; sites are solved one after the other."""
        return max((site.repair + site.working for site in self.sites), default=0)

    @property
    def followed(self) -> int:
        """Bytes of the projections that follow the errors of all sites."""
        return sum(site.followed for site in self.sites)

    @property
    def moments(self) -> int:
        """Most bytes of Grams and other moments at once."""
        return self.statistics + max(self.solving, self.followed)


def size_of(site: Site, statistics: Sequence[str], *, repaired: bool = True) -> SiteSize:
    """Bytes of one site.

    With g groups of n features and m outputs, the Gram of the inputs has `g n²` elements of 8 bytes, and is kept twice,
    for all samples and for the first half; a repair has `g (n² + nm)` for each half that is fitted on, for both
    together and for those held out. Following errors to the outputs takes `2 g k (k + m)` for k = min(m, n).

    Args:
        site: The site.
        statistics: Registered names of the statistics that are collected; one that the library does not know counts as
            a Gram of the inputs or outputs that it reads.
        repaired: True if the site is solved again.
    """
    groups, features = site.geometry.groups, site.geometry.features
    outputs = site.geometry.canonical_shape[0]
    kept = largest = 0
    rank = min(outputs, features)
    for name in statistics:
        if name == Coherence.name:  # comes with the gradient Gram
            continue
        kind = cast(type[Statistic], lookup(name, Statistic))
        width = outputs if kind.reads_outputs else features
        elements = width if name.endswith("-mean") else width * width
        kept += groups * elements * (SUMS if kind.halved else 1)
        largest = max(largest, elements)
    pairs = groups * (features * features + outputs * features + features + outputs + 1) if repaired else 0
    working = WORKING * max(largest, features * features if repaired else 0)
    followed = 0
    if GradientGram.name in statistics and site.head is None:
        kept += 3 * (rank + 1)
        followed = 2 * groups * rank * (rank + outputs)
    if site.head is not None:  # of its head, inputs and the gradients there are looked at in the same way
        kept *= 2
    return SiteSize(site.path, ELEMENT * kept, ELEMENT * PAIRS * pairs, ELEMENT * working, ELEMENT * followed)


def sizes_of(sites: Iterable[Site], statistics: Sequence[str], *, repaired: bool = True) -> Sizes:
    """Bytes of all sites; see `size_of`."""
    return Sizes(tuple(size_of(site, statistics, repaired=repaired) for site in sites))


def bounded(
    sites: Sites,
    statistics: Sequence[str],
    *,
    repaired: bool = True,
    limit: int | None = None,
    machine: int | None = None,
) -> Sites:
    """The sites whose moments fit into memory; the others become skips with the reason.

    Without a limit a site is left alone whose largest Gram takes more than 1 GiB (11,585 features), or more than
    256 MiB (5,792 features) and more than 512 times its layer's weight; the limit for all is then half of the machine's
    memory. The widest sites are left alone until the moments of all others fit the limit: the statistics of all of
    them, and what the widest takes while it is solved. A limit below 64 MiB, which one chunk of patches may take,
    counts as 64 MiB.

    Args:
        sites: Sites from `find_sites`.
        statistics: Registered names of the statistics that will be collected.
        repaired: True if sites are solved again.
        limit: Maximum number of bytes of all moments; None is the rule above.
        machine: Bytes of memory of the model's device; None where that is not known.

    Raises:
        MemoryLimitError: No site is left.
    """
    reasons: dict[str, str] = {}
    known = {site.path: site for site in (*sites, *sites.fixed)}
    sizes = {path: size_of(site, statistics, repaired=repaired) for path, site in known.items()}
    if limit is None:
        for path, site in known.items():
            if sizes[path].statistics + sizes[path].repair and (why := _too_wide(site, statistics, repaired=repaired)):
                reasons[path] = why
    room = machine // 2 if limit is None and machine is not None else limit
    if room is not None:
        room = max(room, CHUNK_BYTES)
        left = [size for path, size in sizes.items() if path not in reasons]
        left.sort(key=lambda size: size.statistics + size.repair + size.working)
        while left and (needs := Sizes(tuple(left)).moments) > room:
            widest = left.pop()
            reasons[widest.path] = (
                f"{TOO_WIDE}: {_patch(known[widest.path])}, with which moments take {bytes_shown(needs)} where "
                f"{'the limit' if limit is not None else 'half of the memory here'} is {bytes_shown(room)}; a larger "
                "limit of memory takes it in"
            )
    if not reasons:
        return sites
    kept = tuple(site for site in sites if site.path not in reasons)
    if not kept:
        path, why = next(iter(reasons.items()))
        raise MemoryLimitError(
            "memory" if limit is not None else repr(path),
            law="the moments of at least one layer fit into memory",
            got=why.removeprefix(f"{TOO_WIDE}: "),
            cure="pass a larger memory= (all of it is for values and moments, half each), or repair=None and"
            " families=[rankfold.SVD()], which need no moments",
        )
    skips = tuple(Skip(site.path, reasons[site.path]) for site in sites if site.path in reasons)
    fixed = tuple(site for site in sites.fixed if site.path not in reasons)
    return replace(sites, sites=kept, skips=(*sites.skips, *skips), fixed=fixed)


def machine_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, in use or not; None where the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call, or not these names
        return None


def check_fits(sites: Sites, statistics: Sequence[str], *, repaired: bool, limit: int | None) -> None:
    """Refuse sites whose moments do not fit into a limit; None is no limit.

    Raises:
        MemoryLimitError: The moments do not fit; the widest site is named.
    """
    sizes = sizes_of(sites, statistics, repaired=repaired)
    if limit is None or sizes.moments <= max(limit, CHUNK_BYTES):
        return
    widest = max(sizes.sites, key=lambda size: size.statistics + size.repair + size.working)
    raise MemoryLimitError(
        "memory",
        law=f"moments of all layers of the plan take at most half of it, {bytes_shown(max(limit, CHUNK_BYTES))}",
        got=f"{bytes_shown(sizes.moments)}, most of it for {widest.path!r}",
        cure="pass a larger memory=, or take that layer's decision out of the plan",
    )


def _too_wide(site: Site, statistics: Sequence[str], *, repaired: bool) -> str | None:
    """Reason why a site's largest Gram is out of proportion; None where it is not."""
    geometry, outputs = site.geometry, site.geometry.canonical_shape[0]
    kinds = [cast(type[Statistic], lookup(name, Statistic)).reads_outputs for name in statistics]
    reads = repaired or not all(kinds)
    width = max(geometry.features if reads else 0, outputs if any(kinds) else 0)
    gram = ELEMENT * geometry.groups * width * width
    weight = site.element_size * geometry.n_params
    if gram <= SMALL_GRAM or (gram <= LARGEST_GRAM and gram <= PROPORTION * weight):
        return None
    what = _patch(site) if width == geometry.features else f"{width:,} outputs"
    return (
        f"{TOO_WIDE}: {what}, whose Gram takes {bytes_shown(gram)} for a weight of {bytes_shown(weight)}; a limit of"
        " memory that leaves room for it takes it in"
    )


def _patch(site: Site) -> str:
    """The width of a layer's input, in words."""
    kind = "patch" if site.geometry.kernel else "row"
    return f"a {kind} of {site.geometry.features:,} features"

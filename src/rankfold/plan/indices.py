"""Ascending indices as short text: `"0-4,7,9-12"`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)
MOST = 2**24  # indices that one text may stand for: a short text must not fill the memory


def as_ranges(indices: Sequence[int]) -> str:
    """Runs of neighbours as `first-last`, others alone, with commas in between.

    Args:
        indices: Ascending indices.
    """
    runs = []
    for _, pairs in itertools.groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in pairs]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(runs)


def from_ranges(text: str) -> tuple[int, ...] | None:
    """Indices of a text from `as_ranges`; None where it is no such text, does not ascend, or stands for over `MOST`."""
    if not _RANGES.fullmatch(text):
        return None
    indices: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        start, end = int(first), int(last or first)
        if end < start or (indices and start <= indices[-1]) or len(indices) + end - start >= MOST:
            return None
        indices += range(start, end + 1)
    return tuple(indices)

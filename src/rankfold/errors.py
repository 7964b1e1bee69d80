"""One tree of errors; every message names the place, the law, the values and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankfoldError(Exception):
    """Base of every error rankfold raises on purpose.

    The text reads *place · law that must hold · what was got · what to do*.

    Args:
        place: Site path, file or argument at which the law is broken.
        law: What must hold there.
        got: The values that break it.
        cure: What the reader can do about it.
    """

    def __init__(self, place: str, *, law: str, got: str, cure: str) -> None:
        super().__init__(f"{place} · {law} · got {got} · {cure}")
        self.place, self.law, self.got, self.cure = place, law, got, cure


class SiteError(RankfoldError, LookupError):
    """A path or pattern that names no site of the model."""


class ModelError(RankfoldError, ValueError):
    """A model that cannot be compressed as it is: on meta, not finite, not a module."""


class DataError(RankfoldError, ValueError):
    """Calibration data that is empty, of the wrong shape, or not re-iterable."""


class NumericsError(RankfoldError, ArithmeticError):
    """A value that is not finite where the method needs a finite one."""


class OptionError(RankfoldError, ValueError):
    """An option outside its range."""


class BudgetError(RankfoldError, ValueError):
    """A budget that cannot be met.

    Attributes:
        smallest: For each budgeted resource, the smallest whole-model value that can be reached.
    """

    def __init__(self, place: str, *, law: str, got: str, cure: str, smallest: dict[str, int] | None = None) -> None:
        super().__init__(place, law=law, got=got, cure=cure)
        self.smallest = smallest or {}


class PlanError(RankfoldError, ValueError):
    """A plan that is malformed, of an unknown version, or of another model."""


class CheckpointError(RankfoldError, ValueError):
    """A checkpoint directory that is incomplete, truncated or altered."""


class WriteError(RankfoldError, OSError):
    """An output directory that exists already or cannot be written."""


class WorkDirError(RankfoldError, ValueError):
    """A work directory that is of another model, other data or other options."""


class TraceError(RankfoldError, RuntimeError):
    """A model whose forward could not be run or traced on the example."""


class SelfCheckError(RankfoldError, RuntimeError):
    """A compressed module that does not compute what the engine computed."""


class DistributedError(RankfoldError, RuntimeError):
    """Several processes on one compression of which one failed, is gone, or was given something else."""


class RegistryError(RankfoldError, LookupError):
    """A name that no registered method bears."""


class DependencyError(RankfoldError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


def shown(value: object, *, limit: int = 80) -> str:
    """A value for the "got" of a message: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def near_matches(word: str, possible: Iterable[str], *, limit: int = 3) -> str:
    """Words of `possible` most like `word`, for the cure of a message.

    Returns:
        ``"did you mean 'a', 'b'?"``, or a listing of the first few where nothing is alike.
    """
    words = sorted(set(possible))
    near = difflib.get_close_matches(word, words, n=limit, cutoff=0.5)
    if near:
        return "did you mean " + ", ".join(repr(match) for match in near) + "?"
    shown = ", ".join(repr(match) for match in words[:limit])
    return f"possible are {shown}" + (f" and {len(words) - limit} more" if len(words) > limit else "")

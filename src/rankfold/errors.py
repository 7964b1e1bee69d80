"""One tree of errors; every message names the place, the law, the values and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RankfoldError(Exception):
    """Base of every error rankfold raises on purpose.

    The text reads *place · law that must hold · what was got · what to do*.

    Args:
        place: Site path, file or argument at which the law is broken.
        law: Condition that must hold there.
        got: Values that break it.
        cure: Action that the reader can take.
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
        smallest: Smallest value of the whole model that can be reached, for each budgeted resource.
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


class MemoryLimitError(RankfoldError, MemoryError):
    """Memory that could not be had, or that a limit does not leave."""


class RegistryError(RankfoldError, LookupError):
    """A name that no registered method bears."""


class DependencyError(RankfoldError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether an error means that memory could not be had: Python's, a device's, or that of torch's CPU allocator."""
    if isinstance(cause, MemoryError) or "OutOfMemory" in type(cause).__name__:
        return True
    if isinstance(cause, RankfoldError):  # such an error has been classified before, whatever words it quotes
        return False
    text = str(cause) if isinstance(cause, RuntimeError) else ""
    return any(words in text for words in ("not enough memory", "DefaultCPUAllocator", "out of memory"))


@contextmanager
def allocating(place: str, doing: str, *, needs: int | None = None) -> Iterator[None]:
    """Inside, memory that cannot be had is reported as that, once, by the innermost place that knows what it was for.

    Args:
        place: Stage or site path.
        doing: Purpose of the memory, for the message.
        needs: Predicted bytes, where known.

    Raises:
        MemoryLimitError: Memory could not be had.
    """
    try:
        yield
    except Exception as cause:
        if isinstance(cause, MemoryLimitError) or not is_out_of_memory(cause):
            raise
        lines = str(cause).strip().splitlines()
        got = f"{type(cause).__name__}: {lines[0][:200]}" if lines else type(cause).__name__
        raise MemoryLimitError(
            place,
            law=f"memory for {doing}" + (f", {bytes_shown(needs)} by prediction" if needs else ""),
            got=got,
            cure="pass memory=..., exclude the widest layers, or give batches of fewer samples",
        ) from cause


def bytes_shown(amount: float) -> str:
    """Bytes as a person reads them: "34.4 GB", 1 GB being 2³⁰ bytes."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" or amount >= 100 else f"{amount:.3g} {units[0]}"


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

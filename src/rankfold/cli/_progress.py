"""Progress of a reader of data, and numbers of steps to come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rankfold.cli._data import Limited
from rankfold.progress import Progress


class Watched:
    """Data that reports each batch that is read of it. Batches read again, on a second pass, are not counted twice.

    Args:
        data: A re-iterable of batches.
        advance: Function called at each batch.
    """

    def __init__(self, data: Iterable[Any], advance: Callable[[], None]) -> None:
        self._data, self._advance, self._seen = data, advance, 0

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        for number, batch in enumerate(self._data, start=1):
            yield batch
            if number > self._seen:
                self._seen = number
                self._advance()


def expected(data: Iterable[Any]) -> int | None:
    """Approximate number of batches; None where the data has no length."""
    if isinstance(data, Limited):
        from rankfold.data.batches import batch_size

        whole, first = expected(data.batches), next(iter(data.batches), None)
        return None if whole is None or first is None else min(whole, -(-data.limit // batch_size(first)))
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def totalled(progress: Progress, totals: dict[str, int | None]) -> Progress:
    """A `Progress` with numbers of steps for stages that are opened without one."""
    return lambda stage, steps: progress(stage, totals.get(stage) if steps is None else steps)

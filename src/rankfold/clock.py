"""Wall-clock seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from rankfold.errors import allocating

T = TypeVar("T")


class Clock:
    """Wall-clock seconds a stage.

    Args:
        after: Function called after each stage.
    """

    def __init__(self, after: Callable[[], None]) -> None:
        self._after = after
        self.seconds: dict[str, float] = {}

    def taken(self) -> dict[str, float]:
        """Seconds by stage since the last call of this method."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work and add its seconds to a stage."""
        start = time.perf_counter()
        try:
            with allocating(stage, f"the stage {stage!r}"):
                return work()
        finally:
            self._after()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

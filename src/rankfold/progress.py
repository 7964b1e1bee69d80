"""How long work tells how far it is: a function that opens a stage and gives back a step. The library is silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, "int | None"], AbstractContextManager[Callable[[], None]]]


def _nothing() -> None:
    """One step of a stage nobody watches."""


def silent(stage: str, steps: int | None) -> AbstractContextManager[Callable[[], None]]:
    """The default: nothing is shown.

    Args:
        stage: Name of the stage.
        steps: How many steps it has, or None where that is not known.
    """
    return nullcontext(_nothing)

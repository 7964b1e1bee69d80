"""How long work tells how far it is: a function that opens a stage and gives back a step. The library is silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

from rankfold.errors import OptionError, shown

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


def check_progress(progress: Progress) -> None:
    """Refuse what cannot be told of stages.

    Raises:
        OptionError: It is no function.
    """
    if not callable(progress):
        raise OptionError(
            "progress",
            law="a function of a stage's name and its number of steps",
            got=shown(progress),
            cure="leave it out to see nothing",
        )

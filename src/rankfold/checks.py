"""Checks of options: a value that is no flag, no whole number or no number of a range is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from rankfold.errors import OptionError, near_matches, shown


def is_whole(value: object) -> TypeGuard[int]:
    """Whether something is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_flag(place: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        OptionError: The value is no bool.
    """
    if not isinstance(value, bool):
        raise OptionError(place, law="True or False", got=shown(value), cure="pass a bool")


def check_count(place: str, value: Any, *, none: bool = False, cure: str = "leave it out", least: int = 1) -> None:
    """Refuse what is no whole number of at least 1, or another least number.

    Args:
        place: Name of the option.
        value: Value of the option.
        none: True if None is allowed as well.
        cure: Advice for the message.
        least: Least number.

    Raises:
        OptionError: The value is no such number.
    """
    if none and value is None:
        return
    if not is_whole(value) or value < least:
        law = f"an int of at least {least}{', or None' if none else ''}"
        raise OptionError(place, law=law, got=shown(value), cure=cure)


def check_choice(place: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of some words.

    Raises:
        OptionError: The value is none of them.
    """
    if value not in choices:
        law = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise OptionError(place, law=law, got=shown(value), cure=near_matches(str(value), choices))


def check_number(
    place: str, value: Any, *, law: str, cure: str, low: float = 0.0, high: float = math.inf, open_low: bool = False
) -> None:
    """Refuse what is no number of a range.

    Args:
        place: Name of the option.
        value: Value of the option.
        law: Range in words, for the message.
        cure: Advice for the message.
        low: Least number.
        high: Greatest number; infinity is always refused.
        open_low: True if the least number itself is refused.

    Raises:
        OptionError: The value is no number of the range.
    """
    if not is_number(value) or not low <= value <= high or value == math.inf or (open_low and value == low):
        raise OptionError(place, law=law, got=shown(value), cure=cure)

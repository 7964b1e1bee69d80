"""A width as a product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod


@cache
def factored(width: int, count: int) -> tuple[int, ...]:
    """A width as a product of at most `count` factors above 1, as even as possible, the largest first.

    The most even is the one with the smallest sum; 384 in three is (8, 8, 6). A width with fewer prime factors has
    fewer.

    Args:
        width: The width.
        count: Largest number of factors.
    """

    def divisors(n: int) -> Sequence[int]:
        return [k for k in range(2, n + 1) if n % k == 0]

    def grow(rest: int, most: int, left: int) -> list[tuple[int, ...]]:
        if rest == 1:
            return [()]
        if left == 1:
            return [(rest,)] if rest <= most else []
        return [(k, *after) for k in divisors(rest) if k <= most for after in grow(rest // k, k, left - 1)]

    found = grow(width, width, count)
    fullest = max(map(len, found))
    return min(
        (each for each in found if len(each) == fullest and prod(each) == width), key=lambda each: (sum(each), each)
    )

"""Tensor trains by successive singular value decompositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rankfold.linalg.svd import svd

Prefix: TypeAlias = tuple[tuple[int, ...], list[Tensor]]  # all ranks but the last, and the carriages


def carriages(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """TT-SVD without its last carriage: orthonormal ones from the first mode on.

    `T[i, j, …, o] ≈ Σ V_1[a, i] V_2[b, a, j] … Z[z, o]`. Each is the left singular vectors of what the ones before it
    leave, unfolded as (rank · size) × rest; `Z`, the last carriage, is what the tensor is projected on them.

    Args:
        tensor: Tensor, shape (n_1, …, n_d, out).
        ranks: Ranks r_1 to r_d.

    Returns:
        Shapes (r_1, n_1), (r_2, r_1, n_2), …, (r_d, r_{d−1}, n_d).

    References:
        Oseledets, SIAM J. Sci. Comput. 33(5), 2011, algorithm 1.
    """
    found: list[Tensor] = []
    rest = tensor
    for rank in ranks:
        found.append(_next(rest, found)[:rank])
        rest = _left(rest, found)
    return found


def prefixes(tensor: Tensor, ranks: Sequence[tuple[int, ...]]) -> Iterator[Prefix]:
    """The carriages of every tuple of ranks but the last, whose carriage is complete: each is computed once.

    Args:
        tensor: Tensor, as in `carriages`.
        ranks: Tuples r_1 to r_d.

    Yields:
        r_1 to r_{d−1}, and the carriages; the first k rows of the last one belong to `r_d = k`.
    """

    def grow(
        chosen: tuple[int, ...], found: list[Tensor], rest: Tensor
    ) -> Iterator[tuple[tuple[int, ...], list[Tensor]]]:
        complete = _next(rest, found)
        if len(chosen) == len(ranks[0]) - 1:
            yield chosen, [*found, complete]
            return
        for rank in sorted({each[len(chosen)] for each in ranks if each[: len(chosen)] == chosen}):
            longer = [*found, complete[:rank]]
            yield from grow((*chosen, rank), longer, _left(rest, longer))

    yield from grow((), [], tensor)


def _next(rest: Tensor, found: Sequence[Tensor]) -> Tensor:
    """All rows of the next carriage, most important first."""
    if not found:
        return svd(rest.flatten(1))[0].mT
    rows = svd(rest.flatten(0, 1).flatten(1))[0].mT
    return rows.reshape(len(rows), *rest.shape[:2])


def _left(rest: Tensor, found: Sequence[Tensor]) -> Tensor:
    """What is left of a tensor after the last carriage that was found."""
    last = found[-1]
    axes = list(range(1, last.ndim))
    left: Tensor = torch.tensordot(last, rest, (axes, list(range(last.ndim - 1))))
    return left


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The map that carriages are: shape (r_d, n_1, …, n_d)."""
    rows = parts[0]
    for part in parts[1:]:
        rows = torch.movedim(torch.tensordot(part, rows, ([1], [0])), 1, -1)
    return rows

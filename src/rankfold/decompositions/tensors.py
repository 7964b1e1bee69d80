"""What methods of more than two stages share: their grids of widths, and the laws of a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition
from rankfold.errors import OptionError
from rankfold.factors import Rank


def busy_axes(shape: Sequence[int]) -> list[int]:
    """Axes of the kernel of a canonical weight that are longer than 1."""
    return [axis for axis, size in enumerate(shape[2:]) if size > 1]


def refuses_tensor(shape: Sequence[int], form: str) -> str | None:
    """Reason why a weight has no more than two modes; None where it has."""
    if busy_axes(shape) and min(shape[:2]) > 1:
        return None
    return f"the {form} form needs a kernel larger than 1 and more than one channel on each side"


def widths(size: int, count: int, multiple: int) -> list[int]:
    """At most `count` widths from size/count to size, evenly spaced; all but the last are multiples.

    Args:
        size: The largest width.
        count: Number of widths.
        multiple: Number of which the others are multiples.
    """
    even = {max(1, round(size * step / count / multiple)) * multiple for step in range(1, count)}
    return sorted({*(width for width in even if width < size), size})


def check_admitted(method: Decomposition, shape: Sequence[int], rank: Rank) -> tuple[int, ...]:
    """A rank that is a tuple of widths, after checking that the method admits it.

    Raises:
        OptionError: The method does not admit it.
    """
    if not method.admits(shape, rank) or not isinstance(rank, tuple):
        exact = method.ranks(shape)[-1]
        raise OptionError(
            str(method),
            law=f"widths of at most {exact} for a weight {tuple(shape)}, none above what either side of it can fill",
            got=repr(rank),
            cure="choose widths in that range",
        )
    return rank


def narrowed(stage: Tensor, dtype: torch.dtype) -> Tensor:
    """A stage in the dtype of the weight, with storage of its own."""
    return stage.to(dtype).contiguous().clone()

"""Other factors, stored by pivots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, TypeAlias

import torch
from torch import Tensor

from rankfold.errors import OptionError
from rankfold.factors._base import Factors, Rank
from rankfold.linalg.pivots import row_pivots
from rankfold.linalg.precision import widen

Pivots: TypeAlias = tuple[Tensor, Tensor]  # channels that are kept, and the others, which are combinations of these

PIVOTED = "pivoted-"  # before the name of a form that is stored by pivots
PIVOTABLE = ("matrix", "mirrored", "tucker")  # forms with a pointwise stage at an end


def pivoted_ends(form: str, shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether the first and the last stage of a form are those stored by pivots.

    Args:
        form: Name of the form without "pivoted-".
        shape: Shape of the canonical weight, `out × in × kernel…`.
    """
    out, inputs, *kernel = shape
    if form != "matrix":
        return True, form == "tucker"
    first = inputs <= out and all(size == 1 for size in kernel)
    return first, not first


@dataclass(frozen=True, eq=False)
class PivotedFactors(Factors):
    """Other factors stored by pivots: the same map, with `r²` numbers fewer for each end that is stored so.

    A pointwise last stage `L` (out × r) has r rows `J` that the others are combinations of, `L_R = T L_J`: with
    `y_J = L_J z` the other outputs are `y_R = T y_J`. `L_J` is multiplied into the stage before, and the table `T` is
    all that is left of `L`. A pointwise first stage is the mirror image: `R x = R_J (x_J + T x_R)`. Of the matrix form
    of a pointwise layer, where each stage is pointwise, the side with fewer channels is stored so. See `row_pivots` for
    `J` and the bound on `T`.

    Attributes:
        base: The factors, of a form among `PIVOTABLE`.
        ends: Whether the first and the last stage are those stored so; None is `pivoted_ends`.

    References:
        PIFA, ICML 2025, for the output side of linear layers. We differ in the input side, in convolutions and Tucker's
        outer factors, and in the bound on the table.
    """

    base: Factors
    ends: tuple[bool, bool] | None = None

    def __post_init__(self) -> None:
        if self.base.form not in PIVOTABLE:
            raise OptionError(
                "PivotedFactors.base",
                law=f"a form with a pointwise stage: {', '.join(PIVOTABLE)}",
                got=repr(self.base.form),
                cure="leave the factors as they are",
            )

    @property
    def form(self) -> str:  # type: ignore[override]
        """The form of the base with "pivoted-" before it."""
        return PIVOTED + self.base.form

    @property
    def ranks(self) -> Rank:
        """The ranks of the base."""
        return self.base.ranks

    @property
    def inputs(self) -> Pivots | None:
        """Input channels `J` and the others; None where the first stage is not stored by pivots."""
        return self._solved[1]

    @property
    def outputs(self) -> Pivots | None:
        """Output channels `J` and the others; None where the last stage is not stored by pivots."""
        return self._solved[2]

    def stages(self) -> tuple[Tensor, ...]:
        """Table of the inputs, core, table of the outputs: those that there are and have entries."""
        return self._solved[0]

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        return self.base.reconstruct()

    def mixed(self, matrix: Tensor) -> Self:
        """The base mixed, with pivots of its own."""
        return replace(self, base=self.base.mixed(matrix))

    @cached_property
    def _solved(self) -> tuple[tuple[Tensor, ...], Pivots | None, Pivots | None]:
        parts = [widen(stage) for stage in self.base.stages()]
        out, inputs = parts[-1].shape[0], parts[0].shape[1]
        kernel = [max(sizes) for sizes in zip(*(part.shape[2:] for part in parts), strict=True)]
        first, last = self.ends or pivoted_ends(self.base.form, (out, inputs, *kernel))
        left = parts.pop() if last else None
        right = parts.pop(0) if first else None
        (core,) = parts
        ones = [1] * len(kernel)
        tables: list[Tensor | None] = [None, None]
        pivots: list[Pivots | None] = [None, None]
        if right is not None:
            flat = right.flatten(1)
            kept, others, table = row_pivots(flat.mT)
            core = torch.einsum("or...,rj->oj...", core, flat[:, kept])
            pivots[0], tables[0] = (kept, others), table.mT.reshape(len(kept), len(others), *ones)
        if left is not None:
            flat = left.flatten(1)
            kept, others, table = row_pivots(flat)
            core = torch.einsum("jr,ri...->ji...", flat[kept], core)
            pivots[1], tables[1] = (kept, others), table.reshape(len(others), len(kept), *ones)
        stages = [each for each in (tables[0], core, tables[1]) if each is not None and each.numel()]
        dtype = self.base.stages()[0].dtype
        return tuple(stage.to(dtype).contiguous().clone() for stage in stages), pivots[0], pivots[1]

"""Factors of more stages: canonical polyadic, tensor trains, and Tucker with spatial modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from rankfold.factors._base import Factors


@dataclass(frozen=True, eq=False)
class CPFactors(Factors):
    """`1×1 → R`, a `k×k` for each channel, `1×1 → out`: `W[o, i, k] = Σ_r output[o, r] kernel[r, k] input[r, i]`.

    Attributes:
        output: Last stage, shape (out, R, 1…).
        kernel: Middle stage, depthwise, shape (R, 1, kernel…).
        input: First stage, shape (R, in, 1…).
    """

    output: Tensor
    kernel: Tensor
    input: Tensor
    form = "cp"

    @property
    def ranks(self) -> int:
        """The number of components R."""
        return self.input.shape[0]

    def stages(self) -> tuple[Tensor, Tensor, Tensor]:
        """`input`, `kernel`, `output`."""
        return self.input, self.kernel, self.output

    def mixed(self, matrix: Tensor) -> Self:
        """`output` mixed along its outputs."""
        return replace(self, output=_mixed(matrix, self.output))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        rows = self.kernel * self.input  # R × in × kernel…
        return torch.einsum("or,r...->o...", self.output.flatten(1), rows)


@dataclass(frozen=True, eq=False)
class TrainFactors(Factors):
    """A tensor train: `1×1 → r_1`, one kernel axis a stage, `1×1 → out`.

    `W[o, i, h, w] = Σ last[o, c] W_w[c, b, w] W_h[b, a, h] first[a, i]`.

    Attributes:
        parts: The stages, first applied first, each `out × in × kernel…` with at most one axis longer than 1.
    """

    parts: tuple[Tensor, ...]
    form = "train"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The widths between the stages, first to last."""
        return tuple(part.shape[0] for part in self.parts[:-1])

    def stages(self) -> tuple[Tensor, ...]:
        """The parts."""
        return self.parts

    def mixed(self, matrix: Tensor) -> Self:
        """The last part mixed along its outputs."""
        return replace(self, parts=(*self.parts[:-1], _mixed(matrix, self.parts[-1])))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        return reduce(lambda inner, part: torch.einsum("or...,ri...->oi...", part, inner), self.parts)


@dataclass(frozen=True, eq=False)
class LinearTrainFactors(Factors):
    """A tensor train of a linear layer, whose inputs are seen as `n_d × … × n_1`: one mode a stage, then the outputs.

    `W[o, (…, j, i)] = Σ last[o, z] … part_2[b, (j, a)] part_1[a, i]`.

    Attributes:
        parts: The stages, first applied first: (r_1, n_1), (r_2, n_2·r_1), …, (out, r_d).
        sizes: Sizes of the modes, n_1 to n_d.
    """

    parts: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    form = "linear-train"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The widths between the stages, first to last."""
        return tuple(part.shape[0] for part in self.parts[:-1])

    def stages(self) -> tuple[Tensor, ...]:
        """The parts."""
        return self.parts

    def mixed(self, matrix: Tensor) -> Self:
        """The last part mixed along its outputs."""
        return replace(self, parts=(*self.parts[:-1], _mixed(matrix, self.parts[-1])))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in)."""
        return self.parts[-1] @ joined_parts(self.parts[:-1], self.sizes)


def joined_parts(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The map of a whole input that stages of a linear train but the last are, shape (r_d, in).

    Args:
        parts: The stages, first applied first, as in `LinearTrainFactors`.
        sizes: Sizes of the modes, n_1 to n_d.
    """
    rows = parts[0]
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        rows = torch.einsum("bja,ai->bji", torch.unflatten(part, 1, (size, len(rows))), rows).flatten(1)
    return rows


@dataclass(frozen=True, eq=False)
class FullTuckerFactors(Factors):
    """Tucker over all modes: `1×1 → a`, p filters a channel along each axis, `1×1 → b`, `1×1 → out`.

    `W[o, i, h, w] = Σ output[o, b] core[b, (a, p, q)] filters_h[a, p, h] filters_w[(a, p), q, w] input[a, i]`. In
    Tucker's decomposition all channels share the filters of an axis; as layers, each has its own.

    Attributes:
        output: Last stage, shape (out, b, 1…).
        core: The core, shape (b, a·p·q…, 1…).
        filters: Depthwise stages, one an axis, shape (width · p, 1, kernel…) with one axis longer than 1.
        input: First stage, shape (a, in, 1…).
    """

    output: Tensor
    core: Tensor
    filters: tuple[Tensor, ...]
    input: Tensor
    form = "full-tucker"

    @property
    def ranks(self) -> tuple[int, ...]:
        """`(a, b, p, q…)`."""
        widths = [self.input.shape[0], *(part.shape[0] for part in self.filters)]
        counts = [after // before for before, after in pairwise(widths)]
        return (self.input.shape[0], self.core.shape[0], *counts)

    def stages(self) -> tuple[Tensor, ...]:
        """`input`, `filters`, `core`, `output`."""
        return self.input, *self.filters, self.core, self.output

    def mixed(self, matrix: Tensor) -> Self:
        """`output` mixed along its outputs."""
        return replace(self, output=_mixed(matrix, self.output))

    def reconstruct(self) -> Tensor:
        """`W`, shape (out, in, kernel…)."""
        rows = self.input
        for part in self.filters:
            rows = rows.repeat_interleave(len(part) // len(rows), 0) * part
        core = torch.einsum("ob,br->or", self.output.flatten(1), self.core.flatten(1))
        return torch.einsum("or,r...->o...", core, rows)


def _mixed(matrix: Tensor, stage: Tensor) -> Tensor:
    return torch.einsum("po,or...->pr...", matrix.to(stage), stage)

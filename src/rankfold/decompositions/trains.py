"""What tensor trains share: the best carriages in the metric of whole patches, their errors, and their last stage."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Self

import torch
from torch import Tensor

from rankfold.decompositions._base import Decomposition, Moments, Spectrum
from rankfold.factors import Rank
from rankfold.linalg.modes import PatchMetric, mode_roots, whitened
from rankfold.linalg.projection import balanced
from rankfold.linalg.spectrum import explained_tail
from rankfold.linalg.svd import svd
from rankfold.linalg.train import carriages, joined, prefixes


class Train:
    """A map on patches of several modes that is decomposed into a train: `W[o, (i, j, …)]`, a carriage a mode.

    Args:
        weight: Map `W`, shape (out, N), in the work dtype.
        sizes: Sizes of the modes of a patch, first carriage first; their product is N.
        gram: Second moment `A` of the patches, shape (N, N); None is the identity.
        damping: Relative damping of `A` and of the moment of each mode.
    """

    def __init__(self, weight: Tensor, sizes: Sequence[int], gram: Tensor | None, *, damping: float) -> None:
        self._sizes = sizes
        tensor = weight.reshape(len(weight), *sizes).movedim(0, -1)
        if gram is None:
            self._metric, self._back = PatchMetric(None, weight, damping=0), [torch.eye(n).to(weight) for n in sizes]
        else:
            roots = mode_roots(gram, sizes, damping=damping)
            self._metric, self._back = PatchMetric(gram, weight, damping=damping), [inverse for _, inverse in roots]
            tensor = whitened(tensor, roots, 0)
        self.tensor = tensor
        """The tensor (modes…, out) that is decomposed: `W` times the root of the moment of each mode."""

    def errors(self, grid: Sequence[tuple[int, ...]]) -> Tensor:
        """Relative squared errors at each tuple of widths; none above that of smaller widths of the grid."""
        errors = self._raw(grid)
        table = torch.tensor(grid, device=errors.device)
        within = (table[:, None] <= table).all(-1)  # [i, j]: i is nowhere above j
        return torch.where(within, errors[:, None], torch.inf).amin(0)

    def fitted(self, wanted: tuple[int, ...], grid: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], Tensor]:
        """Carriages of some widths, and the last stage.

        Where the metric prefers smaller widths of the grid, theirs are taken, with zeros.

        Returns:
            Carriages as `carriages` gives them, and the last stage, shape (out, r_d).
        """
        below = [each for each in grid if each != wanted and _within(each, wanted)]
        raw = self._raw([wanted, *below]).tolist()
        best = [wanted, *below][raw.index(min(raw))]
        parts = _padded(_turned(carriages(self.tensor, best), self._back), wanted)
        last = self._metric.refit(joined(parts).flatten(1))
        left, right = balanced(last[:, :, None], parts[-1].flatten(1))
        parts[-1] = right.reshape(parts[-1].shape)
        return parts, left[:, :, 0]

    def _raw(self, ranks: Sequence[tuple[int, ...]]) -> Tensor:
        """Errors of the carriages of TT-SVD. In the metric of whole patches they may grow with a width by chance."""
        found = {}
        for chosen, parts in prefixes(self.tensor, ranks):
            rows = joined(_turned(parts, self._back)).flatten(1)
            found[chosen] = explained_tail(self._metric.projected(rows), self._metric.total, block=1)
        return torch.stack([found[rank[:-1]][rank[-1]] for rank in ranks])


class TrainMethod(Decomposition):
    """What methods whose factors are trains share; a subclass says what the modes are, and how stages are made.

    Attributes:
        whitened: True if the input moments are used.
        multiple_of: Number of which the widths of the grid of ranks are multiples, but for the exact ones.
    """

    whitened: bool
    multiple_of: int

    @abstractmethod
    def sizes(self, shape: Sequence[int]) -> Sequence[int]:
        """Sizes of the modes of a patch, first carriage first."""

    @abstractmethod
    def train(self, weight: Tensor, moments: Moments) -> Train:
        """The train that a weight is decomposed into."""

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    def at_multiples(self, multiple: int) -> Self:
        """This method with a grid of multiples."""
        return replace(self, multiple_of=math.lcm(self.multiple_of, multiple))  # type: ignore[type-var]

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any widths of which none is larger than what either side of it can fill."""
        return admits_widths(self.sizes(shape), shape[0], rank)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors of the last width all at once, for each tuple of the others; none above that of smaller widths."""
        return self.train(weight, moments).errors(self.grid(weight.shape))

    def grid(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The ranks, all of which are tuples."""
        return [rank for rank in self.ranks(shape) if isinstance(rank, tuple)]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the unfoldings between the modes, n_1 × rest to (n_1 ⋯ n_d) × out."""
        tensor = self.train(weight, moments).tensor
        cuts = (tensor.flatten(0, at).flatten(1) for at in range(tensor.ndim - 1))
        return tuple(Spectrum(svd(matrix)[1], *matrix.shape) for matrix in cuts)


def largest_widths(sizes: Sequence[int], out: int) -> tuple[int, ...]:
    """The smallest widths that are exact.

    Args:
        sizes: Sizes of the modes of a patch.
        out: Number of outputs.
    """
    return tuple(min(prod(sizes[: i + 1]), prod(sizes[i + 1 :]) * out) for i in range(len(sizes)))


def admits_widths(sizes: Sequence[int], out: int, rank: object) -> bool:
    """Whether no width of a rank is larger than what either side of it can fill."""
    if not isinstance(rank, tuple) or len(rank) != len(sizes) or any(type(part) is not int for part in rank):
        return False
    left, right = (1, *rank[:-1]), (*rank[1:], out)
    after = (*sizes[1:], 1)
    return all(
        1 <= width <= min(before * size, beyond * later)
        for width, before, size, beyond, later in zip(rank, left, sizes, right, after, strict=True)
    )


def _within(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether widths are nowhere above others."""
    return all(a <= b for a, b in zip(small, large, strict=True))


def _padded(parts: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Carriages with zeros up to some widths."""
    padded, before = [], None
    for part, width in zip(parts, ranks, strict=True):
        shape = (width, part.shape[1]) if before is None else (width, before, part.shape[2])
        whole = part.new_zeros(shape)
        whole[tuple(slice(size) for size in part.shape)] = part
        padded.append(whole)
        before = width
    return padded


def _turned(parts: Sequence[Tensor], back: Sequence[Tensor]) -> list[Tensor]:
    """Carriages taken back from the metrics of their modes, with rows of length 1: lengths go to the next one."""
    found: list[Tensor] = []
    lengths = None
    for part, inverse in zip(parts, back, strict=True):
        rows = part @ inverse if lengths is None else (part * lengths[:, None]) @ inverse
        lengths = torch.linalg.vector_norm(rows.flatten(1), dim=1)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        found.append(rows / lengths.reshape(-1, *[1] * (rows.ndim - 1)))
    return found

"""Tucker-2: narrow the channels, convolve, widen them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rankfold.checks import check_count, check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, check_damping
from rankfold.decompositions.tensors import narrowed, refuses_tensor, widths
from rankfold.errors import OptionError
from rankfold.factors import Factors, Rank, TuckerFactors
from rankfold.linalg.precision import power_of_two_scale, widen
from rankfold.linalg.svd import svd
from rankfold.linalg.tucker import hooi, metric_tucker, metric_tucker_errors, refined_tucker
from rankfold.registry import added, register

GRID = 16  # candidate widths a mode; a plan may name any width in between


@register("tucker2")
@dataclass(frozen=True)
class Tucker2(Decomposition):
    """`1×1 → a`, `k×k → b`, `1×1 → out`: a core between an input and an output matrix. Ranks are tuples `(a, b)`.

    Plain: HOSVD start, then HOOI, best in the Frobenius norm. Whitened: the input matrix comes from the marginal
    moment of a pixel, and what remains is the best rank-b map of the projected patches, in closed form. Where a layer
    is replaced, passes of alternating least squares in that metric follow, each kept where it wins; curves are without.

    Attributes:
        whitened: True if the input moments are used.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.
        passes: Passes of alternating least squares after the closed form; read when `whitened`.
        multiple_of: Number of which the widths of the grid of ranks are multiples, but for the exact ones.

    References:
        Tucker, Psychometrika 31, 1966; Kim et al., arXiv 1511.06530, for convolutions. We differ in the metric of the
        inputs, where the second and third stage have a closed form.
    """

    whitened: bool = True
    damping: float = 1e-6
    multiple_of: int = added(1)
    passes: int = added(2, before=0)

    def __post_init__(self) -> None:
        check_count("Tucker2.passes", self.passes, cure="try 2", least=0)
        check_count("Tucker2.multiple_of", self.multiple_of, cure="try 8")
        check_flag("Tucker2.whitened", self.whitened)
        check_damping(self.damping, "Tucker2")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    @property
    def form(self) -> str:
        """ "tucker"."""
        return "tucker"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only layers with a kernel have three stages worth having."""
        return refuses_tensor(shape, "Tucker")

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """A grid of pairs `(a, b)` that `admits`, ascending; the last is exact."""
        inner, outer = _largest(shape)
        grid = [widths(size, GRID, self.multiple_of) for size in (inner, outer)]
        return [(a, b) for a in grid[0] for b in grid[1] if self.admits(shape, (a, b))]

    def at_multiples(self, multiple: int) -> Tucker2:
        """This method with a grid of multiples."""
        return replace(self, multiple_of=math.lcm(self.multiple_of, multiple))

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the unfoldings along the input and the output channels."""
        work = widen(weight).flatten(2)
        matrices = work.movedim(1, 0).flatten(1), work.flatten(1)
        return tuple(Spectrum(svd(matrix)[1], *matrix.shape) for matrix in matrices)

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any pair up to (in, out) whose core is no wider than its k taps can fill: `b ≤ a·k` and `a ≤ b·k`."""
        if not isinstance(rank, tuple) or len(rank) != 2 or any(type(part) is not int for part in rank):
            return False
        (inner, outer), taps = rank, prod(shape[2:])
        return 1 <= inner <= min(shape[1], outer * taps) and 1 <= outer <= min(shape[0], inner * taps)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> TuckerFactors:
        """See `Decomposition.decompose`."""
        if not self.admits(weight.shape, rank) or not isinstance(rank, tuple):
            raise OptionError(
                str(self),
                law=f"a pair (a, b) of at most ({weight.shape[1]}, {weight.shape[0]}), neither above the other × taps",
                got=repr(rank),
                cure="choose widths in that range",
            )
        work, kernel = widen(weight).flatten(2), weight.shape[2:]
        pair = (rank[0], rank[1])
        if self.whitened:
            out, core, inp = metric_tucker(work, self._patches(moments, work), pair, damping=self.damping)
        else:
            out, core, inp = hooi(work, pair)
        return _stages((out, core, inp), kernel, weight.dtype)

    def refine(self, factors: Factors, weight: Tensor, moments: Moments) -> Factors:
        """Alternating least squares in the metric of the patches; see `refined_tucker`."""
        if not self.whitened or not self.passes or not isinstance(factors, TuckerFactors):
            return factors
        work = widen(weight).flatten(2)
        output, core, inp = (widen(part).flatten(2) for part in (factors.output, factors.core, factors.input))
        parts = (output[:, :, 0], core, inp[:, :, 0])
        found = refined_tucker(work, self._patches(moments, work), parts, damping=self.damping, passes=self.passes)
        return factors if found is parts else _stages(found, weight.shape[2:], factors.core.dtype)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors by one projection for all pairs (whitened), or by one HOOI for each pair (plain)."""
        work = widen(weight).flatten(2)
        pairs = [rank for rank in self.ranks(weight.shape) if isinstance(rank, tuple)]
        if self.whitened:
            inner = sorted({a for a, _ in pairs})
            grid = metric_tucker_errors(work, self._patches(moments, work), inner, damping=self.damping)
            return torch.stack([grid[inner.index(a), b - 1] for a, b in pairs])
        work = work / power_of_two_scale(work)
        total = work.square().sum()
        if float(total) <= 0:
            return work.new_zeros(len(pairs))
        captured = [hooi(work, (a, b))[1].square().sum() for a, b in pairs]
        return (1 - torch.stack(captured) / total).clamp(0, 1)

    def _patches(self, moments: Moments, work: Tensor) -> Tensor:
        _, inputs, taps = work.shape
        return moments.metric(self).to(work).reshape(inputs, taps, inputs, taps)


def _stages(parts: tuple[Tensor, Tensor, Tensor], kernel: Sequence[int], dtype: torch.dtype) -> TuckerFactors:
    """Output factor, core and input factor as the stages of a layer."""
    out, core, inp = parts
    ones = [1] * len(kernel)
    stages = (out.reshape(*out.shape, *ones), core.reshape(*core.shape[:2], *kernel), inp.reshape(*inp.shape, *ones))
    output, middle, first = (narrowed(stage, dtype) for stage in stages)
    return TuckerFactors(output, middle, first)


def _largest(shape: Sequence[int]) -> tuple[int, int]:
    """The smallest pair that is exact."""
    taps = prod(shape[2:])
    return min(shape[1], shape[0] * taps), min(shape[0], shape[1] * taps)

"""Tucker over all modes of a convolution, the axes of its kernel too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from rankfold.checks import check_count, check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum, check_damping
from rankfold.decompositions.tensors import busy_axes, check_admitted, narrowed, refuses_tensor, widths
from rankfold.factors import FullTuckerFactors, Rank
from rankfold.linalg.modes import PatchMetric, basis, mode_roots, unfolded, whitened
from rankfold.linalg.precision import widen
from rankfold.linalg.projection import balanced
from rankfold.linalg.svd import svd
from rankfold.linalg.tucker import hosvd, tucker
from rankfold.registry import added, register

GRID = 6  # candidate widths of the channels on a side; a plan may name any width in between
LEVELS = 3  # candidate numbers of filters along the axes of the kernel, which go together in the grid


@register("tucker")
@dataclass(frozen=True)
class Tucker(Decomposition):
    """`1×1 → a`, p filters `k×1` a channel, q filters `1×k`, `1×1 → b`, `1×1 → out`: for large kernels.

    Ranks are tuples `(a, b, p, q…)`. Plain: HOSVD start, then HOOI over all modes, best in the Frobenius norm.
    Whitened: the tensor is multiplied along each mode of a patch by the root of its marginal moment,
    `A ≈ A_in ⊗ A_h ⊗ A_w`, and its HOSVD gives the bases of channels and kernel axes; the core and the output matrix
    are then the best map of rank b of the projected patches, in closed form, in the metric of whole patches.

    Attributes:
        whitened: True if the input moments are used.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.
        multiple_of: Number of which the widths a and b of the grid of ranks are multiples, but for the exact ones.

    References:
        Tucker, Psychometrika 31, 1966; De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000. We
        differ in the metric of the inputs. For kernels of 3 × 3 `Tucker2`, which leaves the kernel whole, is the
        better choice.
    """

    whitened: bool = True
    damping: float = 1e-6
    multiple_of: int = added(1)

    def __post_init__(self) -> None:
        check_count("Tucker.multiple_of", self.multiple_of, cure="try 8")
        check_flag("Tucker.whitened", self.whitened)
        check_damping(self.damping, "Tucker")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    @property
    def form(self) -> str:
        """ "full-tucker"."""
        return "full-tucker"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only layers with a kernel have spatial modes."""
        return refuses_tensor(shape, "full Tucker")

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """A grid of tuples that `admits`, ascending; the last is exact."""
        out, inputs, *sizes = self._sizes(shape)
        inner, outer = (widths(size, GRID, self.multiple_of) for size in (inputs, out))
        levels = sorted({tuple(max(1, round(k * level / LEVELS)) for k in sizes) for level in range(1, LEVELS + 1)})
        grid = [(a, b, *level) for a, b, level in product(inner, outer, levels)]
        return [rank for rank in grid if self.admits(shape, rank)]

    def at_multiples(self, multiple: int) -> Tucker:
        """This method with a grid of multiples."""
        return replace(self, multiple_of=math.lcm(self.multiple_of, multiple))

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any widths up to the shape's of which none is above the product of the others; the whole shape too."""
        out, inputs, *sizes = self._sizes(shape)
        largest = (inputs, out, *sizes)
        if not isinstance(rank, tuple) or len(rank) != len(largest) or any(type(part) is not int for part in rank):
            return False
        if any(not 1 <= part <= most for part, most in zip(rank, largest, strict=True)):
            return False
        return rank == largest or all(part <= prod(rank) // part for part in rank)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> FullTuckerFactors:
        """See `Decomposition.decompose`."""
        inner, outer, *counts = check_admitted(self, weight.shape, rank)
        work = widen(weight)
        tensor = work.reshape(self._sizes(work.shape))
        if self.whitened:
            gram = moments.metric(self).to(work)
            bases = self._bases(tensor, gram)
            parts = [part[:count] for part, count in zip(bases, (inner, *counts), strict=True)]
            metric = PatchMetric(gram, work.flatten(1), damping=self.damping)
            rows = _rows(parts)
            out = svd(metric.projected(rows))[0][:, :outer]
            core = out.mT @ metric.refit(rows)
        else:
            middle, vectors = tucker(tensor, (outer, inner, *counts))
            out, *others = vectors
            parts, core = [each.mT for each in others], middle.flatten(1)
        return self._folded(out, core, parts, weight)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors by one projection for all b (whitened), or by one HOOI for each tuple (plain)."""
        work = widen(weight)
        tensor = work.reshape(self._sizes(work.shape))
        ranks = [rank for rank in self.ranks(weight.shape) if isinstance(rank, tuple)]
        if not self.whitened:
            total = float(tensor.square().sum())
            if not total > 0:
                return work.new_zeros(len(ranks))
            start = hosvd(tensor)
            captured = [tucker(tensor, (b, a, *counts), start=start)[0].square().sum() for a, b, *counts in ranks]
            return (1 - torch.stack(captured) / total).clamp(0, 1)
        gram = moments.metric(self).to(work)
        bases, metric = self._bases(tensor, gram), PatchMetric(gram, work.flatten(1), damping=self.damping)
        found: dict[tuple[int, ...], Tensor] = {}
        for a, _, *counts in ranks:
            if (chosen := (a, *counts)) not in found:
                rows = _rows([part[:count] for part, count in zip(bases, chosen, strict=True)])
                part = metric.projected(rows)
                values = torch.linalg.eigvalsh(part @ part.mT).flip(0).clamp_min(0)
                left = (1 - values.cumsum(0) / metric.total).clamp(0, 1)
                found[chosen] = left if float(metric.total) > 0 else torch.zeros_like(left)
        return torch.stack([found[(a, *counts)][b - 1] for a, b, *counts in ranks])

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the unfoldings along the inputs, the outputs and each axis of the kernel."""
        tensor = widen(weight).reshape(self._sizes(weight.shape))
        if self.whitened:
            gram = moments.metric(self).to(tensor)
            tensor = whitened(tensor, mode_roots(gram, tensor.shape[1:], damping=self.damping))
        outer, inner, *others = (unfolded(tensor, mode) for mode in range(tensor.ndim))
        return tuple(Spectrum(svd(matrix)[1], *matrix.shape) for matrix in (inner, outer, *others))

    def _bases(self, tensor: Tensor, gram: Tensor) -> list[Tensor]:
        """Rows for each mode of a patch, most important first, of length 1."""
        roots = mode_roots(gram, tensor.shape[1:], damping=self.damping)
        tensor = whitened(tensor, roots)
        rows = [basis(tensor, mode).mT @ inverse for mode, (_, inverse) in enumerate(roots, 1)]
        return [torch.nn.functional.normalize(each, dim=1) for each in rows]

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes of the modes: outputs, inputs, and each axis of the kernel that is longer than 1."""
        return [*shape[:2], *(size for size in shape[2:] if size > 1)]

    def _folded(self, out: Tensor, core: Tensor, parts: Sequence[Tensor], weight: Tensor) -> FullTuckerFactors:
        """Matrices as weights `out × in × kernel…`; each channel gets its own copy of the filters."""
        first, *filters = parts
        dims = weight.ndim - 2
        ones = [1] * dims
        width, stages = len(first), []
        for part, axis in zip(filters, busy_axes(weight.shape), strict=True):
            kernel = [part.shape[1] if i == axis else 1 for i in range(dims)]
            stages.append(narrowed(part.repeat(width, 1).reshape(-1, 1, *kernel), weight.dtype))
            width *= len(part)
        left, right = balanced(core[:, :, None], torch.ones(width, 1).to(core))
        spread = right[:, 0]  # powers of two: what the core has too much of goes to the last filters
        stages[-1] = narrowed(stages[-1].to(core) * spread.reshape(-1, 1, *ones), weight.dtype)
        core = left[:, :, 0]
        output, right = balanced(out[:, :, None], core)
        return FullTuckerFactors(
            narrowed(output[:, :, 0].reshape(*out.shape, *ones), weight.dtype),
            narrowed(right.reshape(*core.shape, *ones), weight.dtype),
            tuple(stages),
            narrowed(first.reshape(*first.shape, *ones), weight.dtype),
        )


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """The map that bases of all modes of a patch are: their Kronecker product, shape (a·p·q…, in·k…)."""
    rows = parts[0]
    for part in parts[1:]:
        rows = torch.kron(rows, part)
    return rows

"""Tensor train of a convolution: one kernel axis a stage."""

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
from rankfold.factors import Rank, TrainFactors, TuckerFactors
from rankfold.linalg.modes import PatchMetric, mode_roots, whitened
from rankfold.linalg.precision import widen
from rankfold.linalg.projection import balanced
from rankfold.linalg.spectrum import explained_tail
from rankfold.linalg.svd import svd
from rankfold.linalg.train import carriages, joined, prefixes
from rankfold.registry import added, register

GRID = 5  # candidate widths a stage; a plan may name any width in between
TIED = 16  # candidate widths where all stages have one


@register("tensor-train")
@dataclass(frozen=True)
class TensorTrain(Decomposition):
    """`1×1 → r_1`, `k×1 → r_2`, `1×k → r_3`, `1×1 → out`; or `1×1 → r_1`, `k×k → r_2`, `1×1 → out`.

    TT-SVD of the tensor (in, kernel…, out). Whitened, the tensor is multiplied along each mode of a patch by the root
    of its marginal moment, `A ≈ A_in ⊗ A_h ⊗ A_w`, and the last stage is solved again in the metric of whole patches.
    Ranks are tuples, one width between two stages. Where that metric prefers smaller widths of the grid, their map is
    taken: the error never grows.

    Attributes:
        separable: True for a stage of its own for each axis of the kernel; False for the kernel as one mode, whose form
            is that of `Tucker2`.
        tied: True if all widths are one number, but where the shape allows less.
        whitened: True if the input moments are used.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.
        multiple_of: Number of which the widths of the grid of ranks are multiples, but for the exact ones.

    References:
        Oseledets, SIAM J. Sci. Comput. 33(5), 2011; arXiv 2409.03555 for tied ranks and the kernel as one mode. We
        differ in the metric of the inputs and in the last stage.
    """

    separable: bool = True
    tied: bool = False
    whitened: bool = True
    damping: float = 1e-6
    multiple_of: int = added(1)

    def __post_init__(self) -> None:
        for name in ("separable", "tied", "whitened"):
            check_flag(f"TensorTrain.{name}", getattr(self, name))
        check_damping(self.damping, "TensorTrain")
        check_count("TensorTrain.multiple_of", self.multiple_of, cure="try 8")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    @property
    def form(self) -> str:
        """ "train", or "tucker" with the kernel as one mode."""
        return "train" if self.separable else "tucker"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only layers with a kernel have more than two modes."""
        return refuses_tensor(shape, "tensor train")

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """A grid of tuples that `admits`, ascending; the last is exact."""
        largest = self._largest(shape)
        if self.tied:
            tied = {
                tuple(min(width, most) for most in largest) for width in widths(max(largest), TIED, self.multiple_of)
            }
            return [each for each in sorted(tied) if self.admits(shape, each)]
        axes = [widths(size, GRID, self.multiple_of) for size in largest]
        return [each for each in product(*axes) if self.admits(shape, each)]

    def at_multiples(self, multiple: int) -> TensorTrain:
        """This method with a grid of multiples."""
        return replace(self, multiple_of=math.lcm(self.multiple_of, multiple))

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any widths of which none is larger than what either side of it can fill."""
        sizes = self._sizes(shape)
        if not isinstance(rank, tuple) or len(rank) != len(sizes) or any(type(part) is not int for part in rank):
            return False
        left, right = (1, *rank[:-1]), (*rank[1:], shape[0])
        after = (*sizes[1:], 1)
        return all(
            1 <= width <= min(before * size, beyond * later)
            for width, before, size, beyond, later in zip(rank, left, sizes, right, after, strict=True)
        )

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> TrainFactors | TuckerFactors:
        """See `Decomposition.decompose`."""
        wanted = check_admitted(self, weight.shape, rank)
        work = widen(weight)
        metric, tensor, back = self._whitened(work, moments)
        below = [each for each in self._grid(weight.shape) if each != wanted and _within(each, wanted)]
        raw = _errors(metric, tensor, back, [wanted, *below]).tolist()
        best = [wanted, *below][raw.index(min(raw))]
        parts = _padded(_turned(carriages(tensor, best), back), wanted)
        last = metric.refit(joined(parts).flatten(1))
        left, right = balanced(last[:, :, None], parts[-1].flatten(1))
        parts[-1] = right.reshape(parts[-1].shape)
        pointwise = left.reshape(*left.shape[:2], *[1] * (weight.ndim - 2))
        stages = [narrowed(each, weight.dtype) for each in (*self._folded(parts, weight.shape), pointwise)]
        if self.separable:
            return TrainFactors(tuple(stages))
        first, core, output = stages
        return TuckerFactors(output, core, first)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors of the last width all at once, for each tuple of the others; none above that of smaller widths."""
        metric, tensor, back = self._whitened(widen(weight), moments)
        ranks = self._grid(weight.shape)
        errors = _errors(metric, tensor, back, ranks)
        table = torch.tensor(ranks, device=errors.device)
        within = (table[:, None] <= table).all(-1)  # [i, j]: i is nowhere above j
        return torch.where(within, errors[:, None], torch.inf).amin(0)

    def _grid(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        return [rank for rank in self.ranks(shape) if isinstance(rank, tuple)]

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of the unfoldings between the modes, (in × rest) to (in·k… × out); () for tied widths."""
        if self.tied:
            return ()
        _, tensor, _ = self._whitened(widen(weight), moments)
        cuts = (tensor.flatten(0, at).flatten(1) for at in range(tensor.ndim - 1))
        return tuple(Spectrum(svd(matrix)[1], *matrix.shape) for matrix in cuts)

    def _whitened(self, work: Tensor, moments: Moments) -> tuple[PatchMetric, Tensor, list[Tensor]]:
        """The metric of patches, the tensor (in, kernel…, out) that is decomposed, and the way back of each mode."""
        sizes = self._sizes(work.shape)
        tensor = work.reshape(len(work), *sizes).movedim(0, -1)
        if not self.whitened:
            return PatchMetric(None, work.flatten(1), damping=0), tensor, [torch.eye(size).to(work) for size in sizes]
        gram = moments.metric(self).to(work)
        roots = mode_roots(gram, sizes, damping=self.damping)
        metric = PatchMetric(gram, work.flatten(1), damping=self.damping)
        return metric, whitened(tensor, roots, 0), [inverse for _, inverse in roots]

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes of the modes of a patch: channels, and each axis of the kernel that is longer than 1, or all as one."""
        kernel = [size for size in shape[2:] if size > 1]
        return [shape[1], *(kernel if self.separable else [prod(kernel)])]

    def _largest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The smallest widths that are exact."""
        sizes = self._sizes(shape)
        return tuple(min(prod(sizes[: i + 1]), prod(sizes[i + 1 :]) * shape[0]) for i in range(len(sizes)))

    def _folded(self, parts: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
        """Carriages as weights `out × in × kernel…`."""
        first, *others = parts
        kernel = list(shape[2:])
        stages = [first.reshape(*first.shape, *[1] * len(kernel))]
        if not self.separable:
            return [*stages, others[0].reshape(*others[0].shape[:2], *kernel)]
        for part, axis in zip(others, busy_axes(shape), strict=True):
            stages.append(part.reshape(*part.shape[:2], *(size if i == axis else 1 for i, size in enumerate(kernel))))
        return stages


def _within(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether widths are nowhere above others."""
    return all(a <= b for a, b in zip(small, large, strict=True))


def _errors(metric: PatchMetric, tensor: Tensor, back: Sequence[Tensor], ranks: Sequence[tuple[int, ...]]) -> Tensor:
    """Errors of the carriages of TT-SVD. In the metric of whole patches they may grow with a width by chance."""
    found = {}
    for chosen, parts in prefixes(tensor, ranks):
        rows = joined(_turned(parts, back)).flatten(1)
        found[chosen] = explained_tail(metric.projected(rows), metric.total, block=1)
    return torch.stack([found[rank[:-1]][rank[-1]] for rank in ranks])


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

"""Tensor train of a convolution: one kernel axis a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor

from rankfold.checks import check_count, check_flag
from rankfold.decompositions._base import Moments, Spectrum, check_damping
from rankfold.decompositions.tensors import busy_axes, check_admitted, narrowed, refuses_tensor, widths
from rankfold.decompositions.trains import Train, TrainMethod, largest_widths
from rankfold.factors import Rank, TrainFactors, TuckerFactors
from rankfold.linalg.precision import widen
from rankfold.registry import added, register

GRID = 5  # candidate widths a stage; a plan may name any width in between
TIED = 16  # candidate widths where all stages have one


@register("tensor-train")
@dataclass(frozen=True)
class TensorTrain(TrainMethod):
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
    def form(self) -> str:
        """ "train", or "tucker" with the kernel as one mode."""
        return "train" if self.separable else "tucker"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only layers with a kernel have more than two modes."""
        return refuses_tensor(shape, "tensor train")

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """A grid of tuples that `admits`, ascending; the last is exact."""
        largest = largest_widths(self.sizes(shape), shape[0])
        if self.tied:
            tied = {
                tuple(min(width, most) for most in largest) for width in widths(max(largest), TIED, self.multiple_of)
            }
            return [each for each in sorted(tied) if self.admits(shape, each)]
        axes = [widths(size, GRID, self.multiple_of) for size in largest]
        return [each for each in product(*axes) if self.admits(shape, each)]

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> TrainFactors | TuckerFactors:
        """See `Decomposition.decompose`."""
        wanted = check_admitted(self, weight.shape, rank)
        parts, last = self.train(weight, moments).fitted(wanted, self.grid(weight.shape))
        pointwise = last.reshape(*last.shape, *[1] * (weight.ndim - 2))
        stages = [narrowed(each, weight.dtype) for each in (*self._folded(parts, weight.shape), pointwise)]
        if self.separable:
            return TrainFactors(tuple(stages))
        first, core, output = stages
        return TuckerFactors(output, core, first)

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """See `TrainMethod.spectra`; () for tied widths."""
        return () if self.tied else super().spectra(weight, moments)

    def train(self, weight: Tensor, moments: Moments) -> Train:
        work = widen(weight).flatten(1)
        gram = moments.metric(self).to(work) if self.whitened else None
        return Train(work, self.sizes(weight.shape), gram, damping=self.damping)

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """Sizes of the modes of a patch: channels, and each axis of the kernel that is longer than 1, or all as one."""
        kernel = [size for size in shape[2:] if size > 1]
        return [shape[1], *(kernel if self.separable else [prod(kernel)])]

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

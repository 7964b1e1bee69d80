"""Tensor train of a linear layer, whose inputs are seen as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rankfold.checks import check_count, check_flag, check_number
from rankfold.decompositions._base import Moments, check_damping
from rankfold.decompositions.tensors import check_admitted, narrowed, widths
from rankfold.decompositions.trains import Train, TrainMethod, largest_widths
from rankfold.factors import LinearTrainFactors, Rank, factored
from rankfold.linalg.precision import widen
from rankfold.registry import register

GRID = 5  # candidate widths a stage but the last; a plan may name any width in between
MOST = 5  # modes at most
LAST = 16  # the same of the last stage


@register("linear-train")
@dataclass(frozen=True)
class LinearTrain(TrainMethod):
    """`in = n_1 ⋯ n_d` seen as a tensor: linear layers `n_1 → r_1`, `n_2 r_1 → r_2`, …, `n_d r_{d−1} → r_d → out`.

    TT-SVD of the tensor (n_1, …, n_d, out). The last bond is the rank of a low-rank pair, whose first factor is a
    train: where features have no order, as in most networks, it is the pair that saves, and not the train.

    Ranks are tuples, one width behind each mode. Factors of the width are as even as possible, the largest first; it is
    the mode that lies closest in memory, so that no stage has to transpose.

    Attributes:
        modes: Number of factors of the width of the inputs, 2 to 5; a width with fewer prime factors has fewer.
        whitened: True if the input moments are used, as in `TensorTrain`.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.
        multiple_of: Number of which the widths of the grid of ranks are multiples, but for the exact ones.

    References:
        Oseledets, SIAM J. Sci. Comput. 33(5), 2011. Novikov et al., arXiv 1509.06569, split the outputs as well, one
        factor of each side a carriage; we split the inputs alone, so that the last stage can be solved in closed form
        and repaired as that of every other method.
    """

    modes: int = 3
    whitened: bool = True
    damping: float = 1e-6
    multiple_of: int = 1

    def __post_init__(self) -> None:
        law = f"a whole number from 2 to {MOST}: its grid of ranks has {GRID} widths a mode"
        check_number("LinearTrain.modes", self.modes, law=law, cure="try 3", low=2, high=MOST)
        check_count("LinearTrain.modes", self.modes, cure="try 3")
        check_flag("LinearTrain.whitened", self.whitened)
        check_damping(self.damping, "LinearTrain")
        check_count("LinearTrain.multiple_of", self.multiple_of, cure="try 8")

    @property
    def form(self) -> str:
        """ "linear-train"."""
        return "linear-train"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only linear layers whose width is a product."""
        if len(shape) > 2:
            return "a convolution has modes of its own: see TensorTrain"
        if len(self.sizes(shape)) < 2:
            return f"a width of {shape[1]} is no product"
        return None

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """A grid of tuples that `admits`, ascending; the last is exact."""
        *inner, last = largest_widths(self.sizes(shape), shape[0])
        axes = [*(widths(size, GRID, self.multiple_of) for size in inner), widths(last, LAST, self.multiple_of)]
        return [each for each in product(*axes) if self.admits(shape, each)]

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> LinearTrainFactors:
        """See `Decomposition.decompose`."""
        wanted = check_admitted(self, weight.shape, rank)
        parts, last = self.train(weight, moments).fitted(wanted, self.grid(weight.shape))
        first, *middle = parts
        stages = (first, *(part.movedim(1, 2).flatten(1) for part in middle), last)
        return LinearTrainFactors(
            tuple(narrowed(each, weight.dtype) for each in stages), tuple(self.sizes(weight.shape))
        )

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        return factored(shape[1], self.modes)

    def train(self, weight: Tensor, moments: Moments) -> Train:
        """The train of the weight, with its inputs in the order of the modes: the last one in memory first."""
        sizes = self.sizes(weight.shape)
        axes = range(len(sizes))
        order = torch.arange(weight.shape[1], device=weight.device).reshape(sizes[::-1]).permute(*reversed(axes))
        places = order.flatten()
        gram = moments.metric(self).to(widen(weight))[places][:, places] if self.whitened else None
        return Train(widen(weight)[:, places], sizes, gram, damping=self.damping)

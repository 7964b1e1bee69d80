"""Modules that take the place of a layer while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankfold.layers import tensor


class Overparameterized(nn.Sequential):
    """Layers that multiply out to one: `1×1 in → in`, `k×k in → out`, `1×1 out → out`; of a layer without a kernel two.

    Its children are standard layers, of which the last has the bias.
    """

    def outer(self) -> list[nn.Module]:
        """The layers that start orthonormal: the first and the last of three, the last of two."""
        first, *_, last = list(self)
        return [first, last] if len(self) == 3 else [last]


class Ordered(nn.Module):
    """`k×k → r`, then `1×1 → out` (a linear layer: two), of which the first ranks matter most.

    Attributes:
        first: First layer.
        second: Second layer, which has the bias.
        sampled: Number of ranks that are used in training mode; None is all.
        shown: Number of ranks that are used in any mode; None is all.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.sampled: int | None = None
        self.shown: int | None = None

    @property
    def rank(self) -> int:
        """Number of ranks."""
        return tensor(self.first, "weight").shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """The output of the ranks that are in use."""
        width = self.sampled if self.training and self.sampled is not None else self.shown
        if width is None or width >= self.rank:
            output: Tensor = self.second(self.first(input))
            return output
        own = {name: value for name, value in self.second.named_parameters() if name != "weight"}
        inner = functional_call(self.first, {"weight": tensor(self.first, "weight")[:width]}, (input,))
        narrow: Tensor = functional_call(
            self.second, {"weight": tensor(self.second, "weight")[:, :width], **own}, (inner,)
        )
        return narrow

    def tails(self) -> tuple[Tensor, Tensor]:
        """`‖U_{b:}‖_F` and `‖V_{b:}‖_F` for b = 0 to r − 1, of the second and of the first factor."""
        wide = torch.promote_types(tensor(self.first, "weight").dtype, torch.float32)
        left = tensor(self.second, "weight").flatten(1).to(wide).square().sum(0)
        right = tensor(self.first, "weight").flatten(1).to(wide).square().sum(1)
        tails = [energy.flip(0).cumsum(0).flip(0) for energy in (left, right)]
        return _root(tails[0]), _root(tails[1])


def _root(energy: Tensor) -> Tensor:
    """Square roots, of which those of 0 have the gradient 0."""
    alive = energy != 0  # NaN stays NaN
    return torch.where(alive, torch.where(alive, energy, 1.0).sqrt(), 0.0)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which every module is in eval mode."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training

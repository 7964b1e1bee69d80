"""Streaming moments of a layer's inputs in the compressed network and its target outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankfold.distributed import World
from rankfold.linalg.precision import cross, gram, total, work_dtype


@dataclass(eq=False)
class PairMoments:
    """Sums over positions of `(x', y)`, groups first, in the work dtype.

    Attributes:
        count: Number of positions.
        xx: Sum `Σ x'x'ᵀ`, shape (groups, n, n).
        yx: Sum `Σ y x'ᵀ`, shape (groups, out, n).
        x: Sum `Σ x'`, shape (groups, n).
        y: Sum `Σ y`, shape (groups, out).
        yy: Sum `Σ ‖y‖²`, shape (groups,).
    """

    count: int
    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device) -> PairMoments:
        """Sums over no position."""

        def empty(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=work_dtype(device), device=device)

        return cls(0, empty(features, features), empty(outputs, features), empty(features), empty(outputs), empty())

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add positions.

        Args:
            inputs: Inputs `x'`, shape (groups, positions, n).
            targets: Targets `y`, shape (groups, positions, out).
        """
        self.count += inputs.shape[1]
        self.xx += gram(inputs)
        self.x += total(inputs)
        self.aim(inputs, targets)

    def aim(self, inputs: Tensor, targets: Tensor) -> None:
        """Add targets of positions whose inputs are in the sums already."""
        self.yx += cross(targets, inputs)
        self.y += total(targets)
        self.yy += targets.to(self.xx.dtype).square().sum((1, 2))

    def retargeted(self) -> PairMoments:
        """The sums over the same inputs, with no target yet; the sums over inputs are shared."""
        yx, y, yy = (torch.zeros_like(each) for each in (self.yx, self.y, self.yy))
        return PairMoments(self.count, self.xx, yx, self.x, y, yy)

    def sum_over(self, world: World) -> None:
        """Take in the positions that all other processes saw."""
        count = torch.tensor([self.count], dtype=torch.int64)
        world.sum_([count, self.xx, self.yx, self.x, self.y, self.yy])
        self.count = int(count)

    def error(self, group: int, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error of an affine map against the target.

        `E‖y − Wx' − b‖² = tr(E[yyᵀ]) − 2⟨W, E[yx'ᵀ]⟩ + ⟨W, W E[x'x'ᵀ]⟩ + ‖b‖² − 2bᵀ(E[y] − W E[x'])`.

        Args:
            group: Index of the group.
            weight: Weight `W`, shape (out, n).
            bias: Bias `b`, shape (out,), or None.
        """
        n = max(self.count, 1)
        yx, x, y = (total[group] / n for total in (self.yx, self.x, self.y))
        error = self.yy[group] / n - 2 * (weight * yx).sum() + (weight * (weight @ self.xx[group])).sum() / n
        if bias is not None:
            error = error + bias.square().sum() - 2 * (bias * (y - weight @ x)).sum()
        return float(error.clamp_min(0))

    def __add__(self, other: PairMoments) -> PairMoments:
        """Sums over the positions of both."""
        return PairMoments(
            self.count + other.count,
            self.xx + other.xx,
            self.yx + other.yx,
            self.x + other.x,
            self.y + other.y,
            self.yy + other.yy,
        )


FIRST, SECOND, HELD = range(3)


@dataclass(eq=False)
class SplitMoments:
    """Moments of the samples that are fitted on, in two halves, and of those that are held out.

    Attributes:
        first: Moments of one half of the fitted samples.
        second: Moments of the other half.
        held: Moments of samples that nothing is fitted on.
    """

    first: PairMoments
    second: PairMoments
    held: PairMoments

    @classmethod
    def zeros(cls, groups: int, features: int, outputs: int, device: torch.device) -> SplitMoments:
        """Moments of no sample."""
        first, second, held = (PairMoments.zeros(groups, features, outputs, device) for _ in range(3))
        return cls(first, second, held)

    @property
    def parts(self) -> tuple[PairMoments, PairMoments, PairMoments]:
        """The three moments, in the order of the labels `FIRST`, `SECOND`, `HELD`."""
        return self.first, self.second, self.held

    @cached_property
    def fit(self) -> PairMoments:
        """Moments of all samples that are fitted on."""
        return self.first + self.second

    @property
    def halved(self) -> bool:
        """Whether both halves have positions."""
        return self.first.count > 0 and self.second.count > 0

    def add(self, other: SplitMoments) -> SplitMoments:
        """Sums over the positions of both."""
        return SplitMoments(self.first + other.first, self.second + other.second, self.held + other.held)

    def retargeted(self) -> SplitMoments:
        """Moments of the same inputs, with no target yet."""
        return SplitMoments(*(each.retargeted() for each in self.parts))

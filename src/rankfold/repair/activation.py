"""Targets of a site behind which an activation stands: errors count as far as it lets them through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rankfold.distributed import World
from rankfold.graph.activations import Activation
from rankfold.linalg.precision import full_products, widen
from rankfold.repair.moments import HELD, SplitMoments
from rankfold.statistics.collect import of_rows

LEAST = 0.3  # weight of an error that the activation lets nothing through of; see `Past`

Rows: TypeAlias = Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]  # as `Gather.rows` yields them
Affine: TypeAlias = tuple[Tensor, Tensor]  # weight (groups, out, n), bias (groups, 1, out)


@dataclass(frozen=True, eq=False)
class Past:
    """A site `y = Wx' + b` seen past its activation, `φ(a y + c + skip')`.

    What the next layers read is `φ`. With the secant slope `s = (φ(p) − φ(p')) / (p − p')` between what stands before
    it for the target `t` and for a map's output `ŷ`, the error there is `‖φ(p) − φ(p')‖² = Σ s² a² (t − ŷ)²`. For fixed
    weights `w = s²` in [0, 1] it is least where least squares towards the *working target*

        z = ŷ + w (t − ŷ)

    gives `ŷ` again, and each such fit lowers `Σ w (t − ŷ)²`, since its difference to `Σ (z − ŷ)²` is least at the old
    `ŷ` (majorisation; De Leeuw 1977). Nothing but the cross moments with `x'` changes. Zhang et al. (2016) fit
    `φ(y)` for a ReLU by an auxiliary `z` with a penalty; here `φ` may be any function, behind a norm and a residual
    `add` too, and a weight is at least 0.3: errors that this `φ` hides count less and not nothing, since the weights
    are those of one fit, and later layers move.

    Attributes:
        activation: The activation.
        factor: Factor `a` of each channel, shape (groups, 1, out).
        offset: Offset `c` of each channel, of the same shape.
        rows: Function that yields the positions, all of them or those of one label.
        world: The processes that share the positions.
    """

    activation: Activation
    factor: Tensor
    offset: Tensor
    rows: Callable[[int | None], Rows]
    world: World

    def moments(self, seen: SplitMoments, fitted: Affine) -> SplitMoments:
        """The moments with the working targets of a map.

        Args:
            seen: Moments with the targets themselves.
            fitted: The map.
        """
        result = seen.retargeted()
        for labels, patches, wanted, skip in self.rows(None):
            aimed = self._working(wanted, _output(fitted, patches), skip)
            for label, moments in enumerate(result.parts):
                chosen = labels == label
                if bool(chosen.any()):
                    moments.aim(of_rows(patches, chosen), of_rows(aimed, chosen))
        for moments in result.parts:
            self.world.sum_([moments.yx, moments.y, moments.yy])
        return result

    def errors(self, seen: SplitMoments, maps: Sequence[Affine]) -> list[float]:
        """Relative error `Σ‖φ(p) − φ(p')‖² / Σ‖φ(p)‖²` of each map over the held-out samples, or all if there are none.

        Args:
            seen: Moments of the site.
            maps: The maps.
        """
        only = HELD if seen.held.count else None
        sums = torch.zeros(len(maps) + 1, dtype=torch.float64)
        for _, patches, wanted, skip in self.rows(only):
            expected = widen(self._past(wanted, skip))
            sums[-1] += expected.square().masked_fill(expected.isinf(), 0.0).sum().cpu()  # masked by the skip branch
            for number, each in enumerate(maps):
                got = widen(self._past(_output(each, patches), skip))
                sums[number] += torch.where(got == expected, 0.0, got - expected).square().sum().cpu()
        self.world.sum_([sums])
        *errors, energy = sums.tolist()
        return [error / (energy or 1.0) for error in errors]

    def _before(self, values: Tensor, skip: Tensor | None) -> Tensor:
        own = self.factor.to(values) * values + self.offset.to(values)
        return own if skip is None else own + skip.to(values)

    def _past(self, values: Tensor, skip: Tensor | None) -> Tensor:
        return self.activation.function(self._before(values.to(_single(values)), skip))

    def _working(self, wanted: Tensor, reached: Tensor, skip: Tensor | None) -> Tensor:
        wanted = wanted.to(reached.dtype)
        aimed, got = self._before(wanted, skip), self._before(reached, skip)
        step = aimed - got
        moved = step.abs() > torch.finfo(step.dtype).eps * (aimed.abs() + got.abs())
        through = self.activation.function(aimed) - self.activation.function(got)
        slope = torch.where(moved, through / torch.where(moved, step, 1.0), 1.0)
        return reached + slope.square().clamp(LEAST, 1) * (wanted - reached)


def _output(fitted: Affine, patches: Tensor) -> Tensor:
    """What a map makes of patches, shape (groups, positions, out)."""
    weight, bias = (each.to(patches.device, _single(patches)) for each in fitted)
    with full_products(patches.device):
        return torch.baddbmm(bias, patches.to(weight.dtype), weight.mT)


def _single(values: Tensor) -> torch.dtype:
    """The dtype of values, or single precision where it is shorter."""
    return torch.promote_types(values.dtype, torch.float32)

"""Penalties that make a weight smooth, so that few ranks hold it: nuclear norm, first and second derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankfold.checks import check_choice, check_number
from rankfold.errors import OptionError, SiteError
from rankfold.training._base import Regularizer
from rankfold.training.nuclear import nuclear_norm, soft_threshold

AXES = ("out", "in", "kernel")
MATRICES = ("out", "spatial")


class _Derivative(Regularizer):
    """Mean of a power of differences of neighbours along axes of a weight, summed over the axes.

    Args:
        weight: See `Regularizer`.
        axis: "out" (from one output channel to the next), "in", "kernel" (along each of its axes), or several.
        power: 2 for squares, 1 for absolute values.
        share: See `Regularizer`.
        only: See `Regularizer`.
        exclude: See `Regularizer`.
    """

    order: int

    def __init__(
        self,
        weight: float | None = None,
        *,
        axis: str | Sequence[str] = "out",
        power: int = 2,
        share: float | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(weight, share=share, only=only, exclude=exclude)
        name = type(self).__name__
        self.axes = (axis,) if isinstance(axis, str) or not isinstance(axis, Sequence) else tuple(axis)
        if not self.axes or any(each not in AXES for each in self.axes):
            raise OptionError(f"{name}.axis", law=f"some of {', '.join(AXES)}", got=repr(axis), cure='try "out"')
        if power not in (1, 2) or isinstance(power, bool):
            raise OptionError(f"{name}.power", law="1 or 2", got=repr(power), cure="try 2")
        self.power = power

    def penalty(self, weight: Tensor) -> Tensor | None:
        """See `Regularizer.penalty`; None where no axis is long enough."""
        places = {"out": (1,), "in": (2,), "kernel": tuple(range(3, weight.ndim))}
        found = []
        for axis in (place for name in self.axes for place in places[name]):
            if weight.shape[axis] > self.order:
                change = torch.diff(weight, n=self.order, dim=axis)
                found.append((change.square() if self.power == 2 else change.abs()).mean())
        return torch.stack(found).sum() if found else None


class FirstDerivative(_Derivative):
    """`R(W) = mean((W[o+1] − W[o])²)`: neighbouring output channels are alike.

    References:
        Runkel et al., arXiv 2505.24469, where the rows of `out × (in·k·k)` are smoothed. Which rows are neighbours is
        the network's choice while it is trained. We differ in the other axes and in absolute values, which are options.
    """

    order = 1


class SecondDerivative(_Derivative):
    """`R(W) = mean((W[o+2] − 2 W[o+1] + W[o])²)`: output channels change evenly from one to the next.

    References:
        As `FirstDerivative`.
    """

    order = 2


class NuclearNorm(Regularizer):
    """`R(W) = ‖M(W)‖_*`, the sum of the singular values: few are large.

    `M` is `out × (in·k…)`, or `(out·kh) × (in·kw)` with `matrix="spatial"`; of a layer with groups one for each.
    Computed from the Gram of the smaller side; see `nuclear_norm`. In place of a penalty at every step, `proximal_`
    takes the step of several at once.

    Args:
        weight: See `Regularizer`.
        matrix: "out" or "spatial".
        share: See `Regularizer`.
        only: See `Regularizer`.
        exclude: See `Regularizer`.

    References:
        Runkel et al., arXiv 2505.24469. We differ in the Gram, and in the proximal step.
    """

    def __init__(
        self,
        weight: float | None = None,
        *,
        matrix: str = "out",
        share: float | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(weight, share=share, only=only, exclude=exclude)
        check_choice("NuclearNorm.matrix", matrix, MATRICES)
        self.matrix = matrix

    def penalty(self, weight: Tensor) -> Tensor | None:
        """See `Regularizer.penalty`; None for the spatial matrix of what is no 2-d convolution."""
        matrices = self._matrices(weight)
        return None if matrices is None else nuclear_norm(matrices)

    @torch.no_grad()
    def proximal_(self, model: nn.Module, step: float) -> None:
        """Take `weight · step` off every singular value, in place: `argmin_X ½‖X − W‖² + weight · step · ‖X‖_*`.

        Called every n steps with `step = n · learning rate`, it is the penalty at a fraction of its price, and
        singular values end at exactly 0.

        Args:
            model: The model that is trained.
            step: Length of the step.

        Raises:
            OptionError: The penalty is a share of a loss, so it has no weight.
        """
        if self.weight is None:
            raise OptionError(
                "NuclearNorm.proximal_", law="the penalty has a weight", got="a share", cure="try NuclearNorm(1e-3)"
            )
        check_number("NuclearNorm.proximal_ step", step, law="a number above 0", cure="try 0.01", open_low=True)
        found = list(self.layers(model))
        for path, layer, _ in found:
            if not isinstance(layer.weight, nn.Parameter):
                raise SiteError(
                    f"NuclearNorm.proximal_ at {path!r}",
                    law="a weight that is a parameter",
                    got="one that is computed from others",
                    cure=f"exclude=[{path!r}], or remove the parametrisation",
                )
        for _, layer, adapter in found:
            weight = adapter.canonical(layer)
            matrices = self._matrices(weight)
            if matrices is not None:
                adapter.rewrite(layer, self._back(soft_threshold(matrices, self.weight * step), weight))

    def _matrices(self, weight: Tensor) -> Tensor | None:
        """The matrices of all groups."""
        if self.matrix == "out":
            return weight.flatten(2)
        return weight.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2) if weight.ndim == 5 else None

    def _back(self, matrices: Tensor, like: Tensor) -> Tensor:
        """A weight from its matrices."""
        if self.matrix == "out":
            return matrices.reshape(like.shape)
        groups, out, inputs, height, width = like.shape
        return matrices.reshape(groups, out, height, inputs, width).permute(0, 1, 3, 2, 4)

"""Kinds of outputs: how changes of them count, for the weighting of errors and for the choice between candidates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankfold.checks import is_number, is_whole
from rankfold.errors import DataError, OptionError, shown
from rankfold.linalg.precision import widen
from rankfold.registry import name_of, register

LARGE = 2**23  # largest number of entries of an output that are processed at once


class Output(ABC):
    """Kind of an output. Subclasses are frozen dataclasses."""

    @abstractmethod
    def direction(self, output: Tensor, noise: Tensor) -> Tensor:
        """A random direction `v` with `E[vvᵀ]` the metric in which a change of the output counts.

        Args:
            output: Output `z`, of any shape; detached.
            noise: Independent standard normal numbers of the output's shape.
        """

    @abstractmethod
    def size(self, output: Tensor) -> Tensor:
        """`‖z‖` in that metric, a scalar: each of several outputs counts relative to it.

        Args:
            output: Output `z`; detached.
        """

    @abstractmethod
    def error(self, original: Tensor, compressed: Tensor) -> Tensor:
        """Two sums over a batch, shape (2,), float64; the divergence of two models is the ratio of their totals.

        Args:
            original: Output `z` of the original, float64.
            compressed: Output `z'` of the compressed model, of the same shape.
        """

    def pieces(self, original: Tensor, compressed: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
        """Parts of two outputs, in order, each with its kind; the sums of `error` over them are those of the whole.

        Large outputs are processed in parts, since each part is converted to float64. By default the whole is one part.
        """
        yield self, original, compressed

    def check(self, place: str, output: Tensor) -> None:  # noqa: B027 - most tensors will do
        """Refuse a tensor that cannot be an output of this kind.

        Raises:
            DataError: It cannot be an output of this kind.
        """

    def __str__(self) -> str:
        """The registered name."""
        return name_of(self)


def class_axis(axes: int) -> int:
    """Default axis of the classes: the last of two or three axes, the second of more (maps)."""
    return axes - 1 if axes <= 3 else 1


def _parts(kind: Output, first: Tensor, second: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
    """Two tensors of (rows, entries), cut by rows where they are large."""
    rows = max(1, LARGE // max(first.shape[1:].numel(), 1))
    for a, b in zip(torch.split(first, rows), torch.split(second, rows), strict=True):
        yield kind, a, b


def _check_axis(axis: int | None) -> None:
    if axis is not None and (not is_whole(axis) or axis == 0):
        raise OptionError("axis", law="a whole number but 0 (the samples), or None", got=shown(axis), cure="try axis=1")


def _axis_of(axis: int | None, place: str, output: Tensor, least: int) -> int:
    """The axis counted from the front.

    Raises:
        DataError: The output has no such axis, or too few entries along it.
    """
    wanted = class_axis(output.ndim) if axis is None else axis
    found = wanted + output.ndim if wanted < 0 else wanted
    if output.ndim < 2 or not 0 < found < output.ndim or output.shape[found] < least:
        raise DataError(
            f"output {place!r}" if place else "output",
            law=f"at least {least} entries along {'the last axis' if axis is None else f'axis {axis}'}, after the "
            "samples",
            got=f"shape {tuple(output.shape)}",
            cure="name the axis, as in rankfold.Logits(axis=1), or say what the output is by outputs=",
        )
    return found


@register("logits")
@dataclass(frozen=True)
class Logits(Output):
    """Scores of classes, the inputs of a softmax: a shift of all changes nothing, the largest decides.

    A change counts by `Σ_c q_c (d_c − Σ q d)²` per row, `q = (1 − s) softmax(z / t) + s / C`, times the C classes: the
    softened Fisher information of the softmax. With `s = 1` all classes count alike. `s` is one number where errors of
    layers are weighted, and another where outputs of two networks are compared.

    The weights come from two random directions per sample, and concentrating these on few classes makes them noisier;
    so there all classes count alike. Outputs are compared without random numbers: there differences that could change
    a decision count more. With 50 photographs, MobileNetV1 at 0.7 of its parameters, four draws: of ten plans each, the
    one taken by `s = 0.5` kept 65.8 % of the decisions, by `s = 1` 62.7 %, by the KL 63.1 %, the best 67.1 %.

    Attributes:
        axis: Axis of the classes; None is the last of two or three axes and the second of more (N×C×H×W maps).
        softening: Softening `s` of the weights of errors, in [0, 1]: 0 weighs classes by their probability alone, 1 all
            alike.
        temperature: Temperature `t`, above 0: a larger one makes the probabilities more even.
        judged: Softening `s` of the choice between candidates and of the report.

    References:
        Amari, Neural Computation 10 (1998), for the Fisher metric `diag(p) − ppᵀ` of a softmax. We differ in the
        softening: the metric itself is zero for a class without probability, and for a sample with a sure decision.
    """

    axis: int | None = None
    softening: float = 1.0
    temperature: float = 1.0
    judged: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        _check_axis(self.axis)
        for name, value in (("softening", self.softening), ("judged", self.judged)):
            if not is_number(value) or not 0 <= value <= 1:
                raise OptionError(name, law="a number from 0 to 1", got=shown(value), cure="try 0.5")
        if not is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise OptionError("temperature", law="a number above 0", got=shown(self.temperature), cure="try 1.0")

    def rows(self, output: Tensor) -> Tensor:
        """The output as examples × classes."""
        return _vectors(output, _axis_of(self.axis, "", output, 2))

    def pieces(self, original: Tensor, compressed: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
        """Parts by rows; see `Output.pieces`."""
        if original.numel() <= LARGE:
            return super().pieces(original, compressed)
        return _parts(replace(self, axis=None), self.rows(original), self.rows(compressed))

    def example_shape(self, output: Tensor) -> torch.Size:
        """Shape of the output without the classes."""
        return output.movedim(_axis_of(self.axis, "", output, 2), -1).shape[:-1]

    def check(self, place: str, output: Tensor) -> None:
        """Require at least two classes; see `Output.check`."""
        _axis_of(self.axis, place, output, 2)

    def direction(self, output: Tensor, noise: Tensor) -> Tensor:
        """`√(C q) ∘ g − q Σ √(C q) ∘ g` along the classes: `E[vvᵀ] = C (diag(q) − qqᵀ)`; `g − mean(g)` where s = 1."""
        axis = _axis_of(self.axis, "", output, 2)
        if self.softening == 1:
            return noise - noise.mean(axis, keepdim=True)
        chances = self._chances(output, axis, self.softening)
        scaled = noise * (chances * output.shape[axis]).sqrt()
        return scaled - chances * scaled.sum(axis, keepdim=True)

    def size(self, output: Tensor) -> Tensor:
        """`√(C Σ_rows (Σ q z² − (Σ q z)²))`."""
        axis, output = _axis_of(self.axis, "", output, 2), widen(output)
        chances = self._chances(output, axis, self.softening)
        centred = output - (chances * output).sum(axis, keepdim=True)
        return (chances * output.shape[axis] * centred.square()).sum().sqrt()

    def error(self, original: Tensor, compressed: Tensor) -> Tensor:
        """`Σ_rows Σ q (d − Σ q d)²` and the same of `z`, `q` the original's: a shift of all changes neither."""
        axis = _axis_of(self.axis, "", original, 2)
        chances = self._chances(original, axis, self.judged)

        def size(values: Tensor) -> Tensor:
            return (chances * (values - (chances * values).sum(axis, keepdim=True)).square()).sum()

        return torch.stack([size(compressed - original), size(original)])

    def _chances(self, output: Tensor, axis: int, softening: float) -> Tensor:
        if softening == 1:
            return torch.full_like(output, 1 / output.shape[axis])
        sure = (output.to(torch.promote_types(output.dtype, torch.float32)) / self.temperature).softmax(axis)
        return (sure * (1 - softening) + softening / output.shape[axis]).to(output)


@register("values")
@dataclass(frozen=True)
class Values(Output):
    """Numbers that count as they are, such as a regression's: by their relative error, `Σ ‖z' − z‖² / Σ ‖z‖²`."""

    def pieces(self, original: Tensor, compressed: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
        """Parts by entries; see `Output.pieces`."""
        if original.numel() <= LARGE:
            return super().pieces(original, compressed)
        return _parts(self, original.flatten(), compressed.flatten())

    def direction(self, output: Tensor, noise: Tensor) -> Tensor:
        """`g` itself: every entry counts alike."""
        return noise

    def size(self, output: Tensor) -> Tensor:
        """`‖z‖` over all entries."""
        norm: Tensor = torch.linalg.vector_norm(output)
        return norm

    def error(self, original: Tensor, compressed: Tensor) -> Tensor:
        """`Σ ‖z' − z‖²` and `Σ ‖z‖²`."""
        return torch.stack([(original - compressed).square().sum(), original.square().sum()])


@register("embedding")
@dataclass(frozen=True)
class Embedding(Output):
    """Vectors that are compared by their direction, by the mean of 1 − cos between before and after.

    Attributes:
        axis: Axis of a vector's entries; None is the last of two or three axes and the second of more.
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_axis(self.axis)

    def check(self, place: str, output: Tensor) -> None:
        """Require vectors of at least two entries; see `Output.check`."""
        _axis_of(self.axis, place, output, 2)

    def direction(self, output: Tensor, noise: Tensor) -> Tensor:
        """`(g − u ⟨u, g⟩) / ‖z‖` per vector, `u = z / ‖z‖`: the gradient of `⟨g, u⟩`; 0 for a vector of zeros."""
        axis = _axis_of(self.axis, "", output, 2)
        unit, norm = _unit(output, axis)
        across = noise - unit * (unit * noise).sum(axis, keepdim=True)
        return torch.where(norm > 0, across / norm.clamp_min(torch.finfo(output.dtype).tiny), torch.zeros_like(across))

    def pieces(self, original: Tensor, compressed: Tensor) -> Iterator[tuple[Output, Tensor, Tensor]]:
        """Parts by vectors; see `Output.pieces`."""
        if original.numel() <= LARGE:
            return super().pieces(original, compressed)
        axis = _axis_of(self.axis, "", original, 2)
        return _parts(replace(self, axis=None), _vectors(original, axis), _vectors(compressed, axis))

    def size(self, output: Tensor) -> Tensor:
        """The root of the number of vectors: each has norm 1."""
        return output.new_tensor(output.numel() / output.shape[_axis_of(self.axis, "", output, 2)]).sqrt()

    def error(self, original: Tensor, compressed: Tensor) -> Tensor:
        """`Σ (1 − cos)` as `‖u' − u‖² / 2`, and the number of vectors; against a vector of zeros cos is 0."""
        axis = _axis_of(self.axis, "", original, 2)
        (first, norm), (second, other) = _unit(original, axis), _unit(compressed, axis)
        apart = (first - second).square().sum(axis, keepdim=True) / 2
        apart = torch.where((norm > 0) == (other > 0), apart, torch.ones_like(apart))
        return torch.stack([apart.sum(), apart.new_tensor(apart.numel())])


def _vectors(output: Tensor, axis: int) -> Tensor:
    """An output as vectors × entries."""
    return output.movedim(axis, -1).flatten(0, -2)


def _unit(output: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Vectors of norm 1, zeros left as they are, and the norms."""
    norm = output.norm(dim=axis, keepdim=True)
    return output / norm.clamp_min(torch.finfo(output.dtype).tiny), norm

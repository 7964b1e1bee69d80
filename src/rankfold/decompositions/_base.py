"""The axis on which methods plug in: canonical weight + moments + rank → Factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from rankfold.errors import DataError, OptionError
from rankfold.factors import Factors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import weighted_energy
from rankfold.registry import name_of

CONSTANT = 1e-6  # share of the second moment below which a covariance is nothing but rounding


@dataclass(frozen=True, eq=False)
class Moments:
    """What calibration inputs say about one group of a site, as plain tensors in the work dtype.

    Attributes:
        gram: Mean second moment `A = E[x xᵀ]` of the flattened inputs (patches `in·k…`), shape (n, n), or None.
        mean: Mean input `E[x]`, shape (n,), or None.
        output_gram: Mean second moment `E[y yᵀ]` of the outputs, shape (out, out), or None.
        bias: Whether the layer has a bias, which can absorb a change of the mean output.
        gradient_gram: Gram of output gradients, shape (out, out): how much the network's output feels a change of
            this site's; or None.
    """

    gram: Tensor | None = None
    mean: Tensor | None = None
    output_gram: Tensor | None = None
    bias: bool = False
    gradient_gram: Tensor | None = None

    def metric(self, method: object) -> Tensor:
        """The Gram that output errors are measured in: the covariance where a bias can absorb the mean, else `A`.

        A covariance whose trace is below 1e-6 of the second moment's is zero: the inputs are constant, and what the
        subtraction leaves is the rounding of float32 products.

        Raises:
            DataError: No input Gram was collected.
        """
        if self.gram is None:
            raise DataError(
                type(method).__name__,
                law="the method sees input moments",
                got="none",
                cure="pass data, or statistics collected with rankfold.collect",
            )
        if self.bias and self.mean is not None:
            covariance = self.gram - torch.outer(self.mean, self.mean)
            constant = covariance.trace() <= CONSTANT * self.gram.trace()
            return torch.where(constant, 0.0, covariance)
        return self.gram


class Family:
    """What `families=` may hold: a way to make layers smaller.

    Attributes:
        needs: Names of the statistics it reads.
    """

    needs: ClassVar[tuple[str, ...]] = ()


class Decomposition(Family, ABC):
    """A method: canonical weight + moments + rank → Factors.

    A subclass is a frozen dataclass whose fields are its options, in a file of its own, named by
    `rankfold.register("its-name")`. It is checked by inheriting `rankfold.testing.DecompositionConformance`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the statistics the method reads: "input-gram", "input-mean", "output-gram"."""

    @property
    @abstractmethod
    def form(self) -> str:
        """Name of the form of its factors: "matrix", "mirrored", "spatial", …"""

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why a canonical weight of this shape is no case for the method; None where it is one."""
        return None

    @abstractmethod
    def candidates(self, shape: Sequence[int]) -> list[Rank]:
        """Ranks worth looking at for a canonical weight `out × in × kernel…`, ascending, the last one exact."""

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Whether a weight of this shape can be decomposed at a rank; a method on a grid admits more than it lists."""
        parts = rank if isinstance(rank, tuple) else (rank,)
        return all(type(part) is int for part in parts) and rank in self.candidates(shape)

    @abstractmethod
    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        """Factorise.

        Args:
            weight: Canonical weight of one group, shape (out, in, kernel…), in the work dtype.
            rank: One of `candidates`.
            moments: Of the same group.

        Returns:
            Factors in the weight's dtype, sharing no storage with it.
        """

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Relative squared output error at each of `candidates`, by decomposing at each of them.

        `e_r = tr(D A Dᵀ) / tr(W A Wᵀ)`, `D = W − reconstruct`; `A = I` for a method that does not read "input-gram".
        A method that knows its errors in closed form overrides this; one that damps its moments may measure in the
        damped metric.

        Returns:
            Shape (len(candidates),), in the order of `candidates`, never growing.
        """
        ranks = self.candidates(weight.shape)
        weight = widen(weight)
        flat = weight.flatten(1)
        reads = "input-gram" in self.needs
        metric = moments.metric(self).to(flat) if reads else torch.eye(flat.shape[1]).to(flat)
        total = weighted_energy(flat, metric)
        rest = [
            weighted_energy(flat - self.decompose(weight, rank, moments).reconstruct().flatten(1), metric)
            for rank in ranks
        ]
        errors = torch.stack(rest) / total if float(total) > 0 else flat.new_zeros(len(rest))
        return torch.cummin(errors.clamp(0, 1), 0).values

    def __str__(self) -> str:
        """The name it bears in JSON with the options that are not at their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return name_of(self) + (f"({', '.join(changed)})" if changed else "")


def canonical(weight: Tensor, rank: Rank, method: Decomposition) -> Tensor:
    """The weight in the work dtype, after checking that the method admits the rank.

    Raises:
        OptionError: It does not.
    """
    if not method.admits(weight.shape, rank):
        ranks = method.candidates(weight.shape)
        raise OptionError(
            str(method),
            law=f"a rank between {ranks[0]} and {ranks[-1]} for a weight {tuple(weight.shape)}",
            got=repr(rank),
            cure="choose a rank in that range",
        )
    return widen(weight)


def check_damping(damping: float, method: str) -> None:
    """Refuse a relative damping outside [0, 1]."""
    if not isinstance(damping, (int, float)) or isinstance(damping, bool) or not 0 <= damping <= 1:
        raise OptionError(
            f"{method}.damping", law="a fraction of the mean eigenvalue, 0 to 1", got=repr(damping), cure="try 1e-6"
        )

"""The axis on which methods plug in: canonical weight + moments + rank → Factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rankfold.checks import check_number
from rankfold.errors import DataError, OptionError
from rankfold.factors import Factors, Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import weighted_energy
from rankfold.registry import name_of

ANCHORS = 4  # ranks at which a curve is judged by decomposing
NOTHING = 1e-14  # relative errors below it are rounding
CONSTANT = 1e-6  # share of the second moment below which a covariance is nothing but rounding


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the calibration inputs of one group of a site, as plain tensors in the work dtype.

    Attributes:
        gram: Mean second moment `A = E[x xᵀ]` of the flattened inputs (patches `in·k…`), shape (n, n), or None.
        mean: Mean input `E[x]`, shape (n,), or None.
        output_gram: Mean second moment `E[y yᵀ]` of the outputs, shape (out, out), or None.
        bias: True if the layer has a bias, which can absorb a change of the mean output.
        gradient_gram: Gram of output gradients, shape (out, out): how strongly the network's output responds to
            a change of this site's; or None.
        groups: For each group of the samples its share of the sum of inputs, and in the last column its share of the
            positions, shape (groups, n + 1); or None.
    """

    gram: Tensor | None = None
    mean: Tensor | None = None
    output_gram: Tensor | None = None
    bias: bool = False
    gradient_gram: Tensor | None = None
    groups: Tensor | None = None

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

    def gradients(self, method: object) -> Tensor:
        """The Gram of the output gradients.

        Raises:
            DataError: It was not collected.
        """
        if self.gradient_gram is None:
            raise DataError(
                type(method).__name__,
                law="the method sees gradients of the network's output",
                got="none",
                cure="leave weighting=True, with a model whose outputs have gradients",
            )
        return self.gradient_gram


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a matrix that a method truncates, for selectors that look at them.

    Attributes:
        values: Singular values, descending, shape (min(rows, columns),).
        rows: Number of rows of the matrix.
        columns: Number of columns of the matrix.
    """

    values: Tensor
    rows: int
    columns: int


class Family:
    """A way to make layers smaller, as `families=` takes it.

    The plans that families of one kind propose under a budget are made in `rankfold.proposals`.

    Attributes:
        needs: Names of the statistics that the family reads.
        sized_by: Quantity that a selector chooses for the family: "ranks", or "widths" (how many channels stay).
        cuts_fixed: True if the family also makes layers smaller whose place no other module can take.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    sized_by: ClassVar[str] = "ranks"
    cuts_fixed: ClassVar[bool] = False


class Decomposition(Family, ABC):
    """A method: canonical weight + moments + rank → Factors.

    A subclass is a frozen dataclass whose fields are its options, in a file of its own, named by
    `rankfold.register("its-name")`. It is checked by inheriting `rankfold.testing.DecompositionConformance`.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the statistics the method reads: "input-gram", "input-mean", "input-groups", "output-gram"; with
    "gradient-gram" it weights outputs itself, and is not made to by `factorise`."""

    @property
    @abstractmethod
    def form(self) -> str:
        """Name of the form of its factors: "matrix", "mirrored", "spatial", …"""

    def output_metric(self, moments: Moments) -> Tensor | None:
        """The Gram of the outputs that `errors` are measured in; None is the identity."""
        return None

    @property
    def map(self) -> Decomposition:
        """The method that makes the map which this one's factors are: itself, unless this one only stores it."""
        return self

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Reason why the method cannot decompose a canonical weight of this shape; None where it can."""
        return None

    @abstractmethod
    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """Ranks worth looking at for a canonical weight `out × in × kernel…`, ascending, the last one exact."""

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Whether a weight of this shape can be decomposed at a rank; a method on a grid admits more than it lists."""
        parts = rank if isinstance(rank, tuple) else (rank,)
        return all(type(part) is int for part in parts) and rank in self.ranks(shape)

    @abstractmethod
    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        """Factorise a weight.

        Args:
            weight: Canonical weight of one group, shape (out, in, kernel…), in the work dtype.
            rank: One of `ranks`.
            moments: Moments of the same group.

        Returns:
            Factors in the weight's dtype, sharing no storage with it.
        """

    def refine(self, factors: Factors, weight: Tensor, moments: Moments) -> Factors:
        """Factors of the same form and rank with no larger an error, made where a layer is replaced.

        What is too slow for every rank of a curve; `errors` are those of `decompose`.

        Args:
            factors: What `decompose` gave.
            weight: The weight it was given, in the work dtype.
            moments: The moments it was given.
        """
        return factors

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Relative squared output error at each of `ranks`, by decomposing at each of them.

        `e_r = tr(D A Dᵀ) / tr(W A Wᵀ)`, `D = W − reconstruct`; `A = I` for a method that does not read "input-gram".
        A method that knows its errors in closed form overrides this; one that damps its moments may measure in the
        damped metric.

        Returns:
            Errors of shape (len(ranks),), in the order of `ranks`, never growing.
        """
        ranks = self.ranks(weight.shape)
        weight = widen(weight)
        flat = weight.flatten(1)
        reads = "input-gram" in self.needs
        eye = torch.eye(flat.shape[1]).to(flat)
        metric = moments.metric(self).to(flat) if reads else eye
        # Inputs without any energy define no metric.
        metric = eye if float(weighted_energy(flat, metric)) <= 0 else metric
        total = weighted_energy(flat, metric)
        rest = [
            weighted_energy(flat - self.decompose(weight, rank, moments).reconstruct().flatten(1), metric)
            for rank in ranks
        ]
        errors = torch.stack(rest) / total if float(total) > 0 else flat.new_zeros(len(rest))
        return torch.cummin(errors.clamp(0, 1), 0).values

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """Relative squared output error at each of `ranks` of factors fitted on some moments, measured in others.

        `e_r = tr(G D B Dᵀ) / tr(G W B Wᵀ)`, `D = W − reconstruct` of the factors made with `moments`, `B` the metric of
        `judge` (`I` without an input Gram) and `G` its gradient Gram (`I` without one). With moments of two halves of
        the samples that is what a rank loses on samples it was not fitted on; and methods that look at other moments,
        or at none, are measured in one metric.

        The weight is decomposed at a few ranks: between them the ratio to `errors` is interpolated, in logarithms, over
        the logarithm of `errors`. A method that knows the error in closed form overrides this.

        Args:
            weight: Canonical weight of one group.
            moments: Moments that the factors are made with.
            judge: Moments that the error is measured in.

        Returns:
            Errors of shape (len(ranks),), in the order of `ranks`; it may be above 1.
        """
        ranks = self.ranks(weight.shape)
        weight = widen(weight)
        flat = weight.flatten(1)
        own = self.errors(weight, moments)
        total = judged_energy(flat, judge, self)
        if float(total) <= 0:
            return own.new_zeros(len(own))
        order = own.argsort()
        order = order[min(int((own <= NOTHING).sum()), len(own) - 1) :]  # exact ranks predict nothing about the others
        places = order[torch.linspace(0, len(order) - 1, min(len(order), ANCHORS)).round().long()]
        seen = torch.stack(
            [
                judged_energy(flat - self.decompose(weight, ranks[i], moments).reconstruct().flatten(1), judge, self)
                for i in places.tolist()
            ]
        )
        level = own.clamp_min(NOTHING).log()
        ratio = (seen / total).clamp_min(NOTHING).log() - level[places]
        between = np.interp(level.cpu().numpy(), level[places].cpu().numpy(), ratio.cpu().numpy())
        return own * torch.from_numpy(between).to(own).exp()

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """Singular values of each matrix whose rank the method sets, in the order of the parts of a rank; () for none.

        Args:
            weight: Canonical weight of one group.
            moments: Moments of the same group.
        """
        return ()

    def changes(self, weight: Tensor, moments: Moments, gradient: Tensor) -> Tensor | None:
        """First-order change of the loss at each of `ranks`, `⟨G, Ŵ_r − W⟩`; None where ranks are not nested.

        Args:
            weight: Canonical weight of one group.
            moments: Moments of the same group.
            gradient: Gradient `G` of the loss by the flattened weight, shape (out, n).
        """
        return None

    def at_multiples(self, multiple: int) -> Decomposition:
        """This method with ranks that are multiples among its `ranks`.

        This is the method itself where it lists every rank, of which a selector can leave out what is no multiple; a
        method on a grid returns one whose grid consists of multiples.
        """
        return self

    def __str__(self) -> str:
        """The name of the method in JSON, with the options that are not at their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return name_of(self) + (f"({', '.join(changed)})" if changed else "")


def judged_energy(change: Tensor, judge: Moments, method: object) -> Tensor:
    """`tr(G D B Dᵀ)` of a change `D` (out, n) in the metric of some moments; `I` for a Gram that is not there."""
    metric = torch.eye(change.shape[1]).to(change) if judge.gram is None else judge.metric(method).to(change)
    if judge.gradient_gram is None:
        return weighted_energy(change, metric)
    return (judge.gradient_gram.to(change) * (change @ metric @ change.mT)).sum().clamp_min(0)


def canonical(weight: Tensor, rank: Rank, method: Decomposition) -> Tensor:
    """The weight in the work dtype, after checking that the method admits the rank.

    Raises:
        OptionError: The method does not admit it.
    """
    if not method.admits(weight.shape, rank):
        ranks = method.ranks(weight.shape)
        raise OptionError(
            str(method),
            law=f"a rank between {ranks[0]} and {ranks[-1]} for a weight {tuple(weight.shape)}",
            got=repr(rank),
            cure="choose a rank in that range",
        )
    return widen(weight)


def check_damping(damping: float, method: str) -> None:
    """Refuse a relative damping outside [0, 1]."""
    law = "a fraction of the mean eigenvalue, 0 to 1"
    check_number(f"{method}.damping", damping, law=law, cure="try 1e-6", high=1)

"""Canonical polyadic form of a convolution: one channel, one kernel and one output direction a component."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from rankfold.checks import check_count, check_flag, check_number
from rankfold.decompositions._base import Decomposition, Moments, canonical, check_damping, judged_energy
from rankfold.decompositions.tensors import narrowed, refuses_tensor
from rankfold.factors import CPFactors, Rank
from rankfold.linalg.cp import Components, alternate, drawn_components, slice_components, squared_distance
from rankfold.linalg.modes import PatchMetric, mode_roots, whitened
from rankfold.linalg.precision import widen
from rankfold.linalg.projection import balanced
from rankfold.registry import added, register

GRID = 10  # candidate ranks; a plan may name any rank in between
EXACT = 1e-14  # share of the energy that is rounding


@register("cp")
@dataclass(frozen=True)
class CP(Decomposition):
    """`1×1 → R`, a depthwise `k×k`, `1×1 → out`: `W[o, i, k] ≈ Σ_r O[o, r] K[r, k] I[r, i]`, R(in + k + out) weights.

    Alternating least squares on the tensor (out, in, taps). Whitened, that tensor is multiplied along the channels and
    the taps by the roots of their marginal moments, `A ≈ A_in ⊗ A_k`, which leaves its form as it is; the last stage is
    then solved again in the metric of whole patches.

    The start is in closed form: the singular values of the slices along the rotated taps. Ranks are climbed along a
    grid: each one starts from that, or from the solution below with the largest terms of what it leaves, whichever is
    better. So the error never grows with the rank, and `R = taps · min(in, out)` is exact.

    Attributes:
        whitened: True if the input moments are used.
        damping: Ridge added to the moments, as a fraction of their mean eigenvalue; read when `whitened`.
        sweeps: Largest number of sweeps at a rank.
        tolerance: Share of its error that a sweep has to gain for another one.
        restarts: Number of random starts that are tried beside, at the first rank of the climb.
        largest: Largest number of weights of a layer; None for any. A sweep takes three times weights × rank
            multiplications, and ranks worth having grow with the layer: at 160 × 160 × 3 × 3 a minute of them.
        multiple_of: Number of which the ranks of the grid are multiples, but for the exact one.

    Errors:
        NumericsError: An element of the weight or of the moments is NaN or infinite. (A sum of terms that cancel each
            other is no error: sweeps end before it, see `rankfold.linalg.cp.alternate`.)

    References:
        Hitchcock, J. Math. Phys. 6, 1927; Lebedev et al., arXiv 1412.6553, for convolutions (there by non-linear least
        squares, and one kernel stage an axis). We differ in the start, the metric, and the last stage.
    """

    whitened: bool = True
    damping: float = 1e-6
    sweeps: int = 30
    tolerance: float = 1e-3
    restarts: int = 0
    largest: int | None = 2**16
    multiple_of: int = added(1)

    def __post_init__(self) -> None:
        check_flag("CP.whitened", self.whitened)
        check_damping(self.damping, "CP")
        check_count("CP.sweeps", self.sweeps, cure="try 30")
        check_number("CP.tolerance", self.tolerance, law="a share of the error, 0 to 1", cure="try 1e-3", high=1)
        check_count("CP.restarts", self.restarts, cure="try 2", least=0)
        check_count("CP.multiple_of", self.multiple_of, cure="try 8")
        check_count("CP.largest", self.largest, none=True)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the input moments when whitened; none otherwise."""
        return ("input-gram", "input-mean") if self.whitened else ()

    @property
    def form(self) -> str:
        """ "cp"."""
        return "cp"

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Only layers with a kernel have three modes, and large ones take long."""
        if self.largest is not None and prod(shape) > self.largest:
            return f"more than {self.largest} weights, which takes CP long (largest=None allows it)"
        return refuses_tensor(shape, "CP")

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """Eleven numbers that save weights, evenly spaced but for the least, and the exact taps · min(in, out)."""
        exact, saving = _exact(shape), _saving(shape)
        shares = (0.5, *range(1, GRID + 1))
        steps = {max(1, int(saving * share / GRID / self.multiple_of)) * self.multiple_of for share in shares}
        return [*sorted(step for step in steps if step < exact), exact]

    def at_multiples(self, multiple: int) -> CP:
        """This method with a grid of multiples."""
        return replace(self, multiple_of=math.lcm(self.multiple_of, multiple))

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """Any number from 1 to the exact one."""
        return type(rank) is int and 1 <= rank <= _exact(shape)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> CPFactors:
        """See `Decomposition.decompose`."""
        work = canonical(weight, rank, self)
        below = [each for each in self.ranks(weight.shape) if each < rank]  # type: ignore[operator]
        *_, (factors, _) = self._climb(work, [*below, rank], moments)
        output, kernel, first = (narrowed(stage, weight.dtype) for stage in factors.stages()[::-1])
        return CPFactors(output, kernel, first)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """Errors of one climb over all `ranks`."""
        work = widen(weight)
        climbed = self._climb(work, self.ranks(weight.shape), moments)
        return work.new_tensor([error for _, error in climbed]).clamp(0, 1)

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """See `Decomposition.judged_errors`; of one climb over all `ranks`."""
        work = widen(weight)
        total = judged_energy(work.flatten(1), judge, self)
        climbed = self._climb(work, self.ranks(weight.shape), moments)
        lost = [judged_energy((work - factors.reconstruct()).flatten(1), judge, self) for factors, _ in climbed]
        errors = torch.stack(lost)
        return errors / total if float(total) > 0 else torch.zeros_like(errors)

    def _climb(self, work: Tensor, ranks: Sequence[Rank], moments: Moments) -> Iterator[tuple[CPFactors, float]]:
        """Factors in the work dtype and their error at each of some ascending ranks."""
        kernel = list(work.shape[2:])
        tensor = work.flatten(2)
        gram = moments.metric(self).to(work) if self.whitened else None
        metric = PatchMetric(gram, tensor.flatten(1), damping=self.damping)
        back: list[Tensor] | None = None
        if gram is not None:
            roots = mode_roots(gram, tensor.shape[1:], damping=self.damping)
            back = [inverse for _, inverse in roots]
            tensor = whitened(tensor, roots)
        closed = slice_components(tensor, max(rank for rank in ranks if isinstance(rank, int)))
        found: Components | None = None
        kept: tuple[CPFactors, float] | None = None
        for rank in ranks:
            count = rank if isinstance(rank, int) else 0
            start = closed.first(count)
            if count == _exact(work.shape):
                found = start
            elif found is None:
                found = self._best(tensor, [start, *(drawn_components(tensor, count, i) for i in range(self.restarts))])
            else:
                found = self._above(tensor, found, start)
            now = _factors(found, back, metric, kernel)
            error = metric.error(now.reconstruct().flatten(1))
            if kept is not None and error > kept[1]:  # the metric of patches is not that of the climb
                now = _factors(_padded(kept[0], start, back), None, metric, kernel)
                error = metric.error(now.reconstruct().flatten(1))
            kept = (now, error)
            yield kept

    def _above(self, tensor: Tensor, below: Components, start: Components) -> Components:
        """The solution at a rank above another: from that one with the largest terms of its rest, or the closed form.

        The one that is closer is the start; the other one is tried where no sweep gets on from there.
        """
        joined = below.joined(slice_components(tensor - below.tensor(), start.rank - below.rank))
        distances = [squared_distance(tensor, each) for each in (joined, start)]
        closer, other = (joined, start) if distances[0] <= distances[1] else (start, joined)
        first, error = self._swept(tensor, closer)
        if error * float(tensor.square().sum()) < min(distances):
            return first
        second, reached = self._swept(tensor, other)
        return second if reached < error else first

    def _best(self, tensor: Tensor, starts: Sequence[Components]) -> Components:
        """The best of what sweeps make of some starts."""
        return min((self._swept(tensor, each) for each in starts), key=lambda each: each[1])[0]

    def _swept(self, tensor: Tensor, start: Components) -> tuple[Components, float]:
        """What sweeps make of a start, and its squared error over the tensor's energy."""
        return alternate(tensor, start, sweeps=self.sweeps, tolerance=self.tolerance)


def _factors(components: Components, back: list[Tensor] | None, metric: PatchMetric, kernel: list[int]) -> CPFactors:
    """Stages of some components, whose last is solved in the metric of patches."""
    _, second, third = components.factors
    first, taps = (second, third) if back is None else (back[0].mT @ second, back[1].mT @ third)
    first, taps = _normal(first), _normal(taps)
    rows = torch.einsum("ir,kr->rik", first, taps).flatten(1)
    output, kernels = balanced(metric.refit(rows)[:, :, None], taps.mT)
    ones = [1] * len(kernel)
    rank = rows.shape[0]
    return CPFactors(
        output.reshape(-1, rank, *ones), kernels.reshape(rank, 1, *kernel), first.mT.reshape(rank, -1, *ones)
    )


def _normal(columns: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(columns, dim=0)
    return columns / torch.where(lengths > 0, lengths, 1.0)


def _padded(factors: CPFactors, start: Components, back: list[Tensor] | None) -> Components:
    """The first and second stage of factors, and as many more components as a start has."""
    more = start.rank - factors.ranks
    _, second, third = start.first(more).factors
    if back is not None:
        second, third = back[0].mT @ second, back[1].mT @ third
    first = torch.cat([factors.input.flatten(1).mT, second], 1)
    taps = torch.cat([factors.kernel.flatten(1).mT, third], 1)
    return Components((first.new_zeros(1, start.rank), first, taps))


def _exact(shape: Sequence[int]) -> int:
    """Components of which every weight of the shape is a sum: a matrix of the channels for every tap."""
    return min(prod(shape[2:]), shape[0] * shape[1]) * min(shape[:2])


def _saving(shape: Sequence[int]) -> int:
    """The largest number of components that hold fewer weights than the kernel, and fewer than are exact."""
    out, inputs, *kernel = shape
    taps = prod(kernel)
    return max(1, min((out * inputs * taps - 1) // (out + inputs + taps), _exact(shape) - 1))

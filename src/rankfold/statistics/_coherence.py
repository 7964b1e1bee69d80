"""The ratio by which a curve's errors are off, at every error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankfold.registry import register
from rankfold.statistics._base import Statistic

SMALLEST = 1e-6  # relative errors below it are not distinguished
LEVELS = torch.logspace(-4, 0, 17, dtype=torch.float64)  # relative errors at which sites are compared
LEAST_VARIANCE = 1e-12


@register("coherence")
@dataclass
class Coherence(Statistic):
    """True and predicted squared changes of the output for every rank r from 0, summed over samples.

    Shape (1, 3, k + 1). `f_r = Σ_s (Σ ⟨g, D_r (x − x̄)⟩)²`, `g` the gradient of a random projection of the network's
    outputs, `D_r` the part of the weight that the whitened SVD to rank r removes, each sample's positions and calls
    summed before they are squared; `p_r = Σ_s Σ gᵀ D_r A D_rᵀ g`; and the sum over samples of the squared terms of
    `f_r`, from which its variance follows. The count is in samples.
    """

    name = "coherence"
    reads_outputs = True
    of_channels = False

    def summand(self, inputs: Tensor, outputs: Tensor | None) -> Tensor:
        """Not defined: the sum needs gradients, and so a backward pass; `collect_gradients` adds it."""
        raise TypeError("coherence is no sum over positions")

    def ratios(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """`log(f/p)` at given relative errors of the curve of the whitened SVD, and its variance over draws.

        Both are interpolated in logarithms. The variance is `(Σf_s²/(Σf_s)² − 1/n) n/(n − 1)`: that of the mean over n
        samples, as a share of its square. It is infinite where no output changed, and for a single sample.

        Args:
            errors: Relative errors, shape (levels,).
        """
        none = torch.zeros_like(errors), torch.full_like(errors, torch.inf)
        if self.total is None or self.count < 2:
            return none
        felt, predicted, squares = self.total[0].double().cpu()
        usable = (felt > 0) & (predicted > predicted[0] * SMALLEST)
        if not bool(usable.any()):
            return none
        felt, predicted, squares = (each[usable].flip(0) for each in (felt, predicted, squares))
        # a running maximum, since by chance a rank more may seem to cost more
        levels = (predicted / predicted[-1]).log().cummax(0).values
        spread = ((squares / felt.square() - 1 / self.count) * self.count / (self.count - 1)).clamp_min(0)
        wanted = errors.double().clamp_min(SMALLEST).log().cpu().numpy()
        ratios, variances = (
            torch.from_numpy(np.interp(wanted, levels.numpy(), each.numpy())).to(errors)
            for each in ((felt / predicted).log(), spread)
        )
        return ratios, variances


def shrunk_towards_mean(values: Tensor, variances: Tensor) -> Tensor:
    """Estimates of several unknowns, each drawn towards the mean of all as far as its own chance explains it.

    With `w = 1/v`, `Q = Σ w (s − Σws/Σw)²` and `τ² = max(0, (Q − (k − 1))/(Σw − Σw²/Σw))` the variance between the
    unknowns, `m = Σ s/(τ² + v) / Σ 1/(τ² + v)`, and each becomes `m + τ²/(τ² + v)(s − m)`.

    Args:
        values: Estimates `s`, shape (k,).
        variances: Variance `v` of each; infinite where nothing is known.

    References:
        DerSimonian and Laird, Controlled Clinical Trials 7, 1986 (τ², by the method of moments).
    """
    weights = 1 / variances.clamp_min(LEAST_VARIANCE)
    total = weights.sum()
    if not float(total) > 0:
        return torch.zeros_like(values)
    mean = (weights * values).sum() / total
    excess = (weights * (values - mean).square()).sum() - (int((weights > 0).sum()) - 1)
    room = total - weights.square().sum() / total
    between = (excess / room).clamp_min(0) if float(room) > 1e-9 * float(total) else torch.zeros_like(total)
    weights = 1 / (between + variances.clamp_min(LEAST_VARIANCE))
    mean = (weights * values).sum() / weights.sum()
    return mean + between * weights * (values - mean)


@dataclass(frozen=True, eq=False)
class CoherenceCurve:
    """True over predicted squared change of the output, by the relative error of a site.

    Attributes:
        logs: Logarithm of the ratio at each of `LEVELS`.
    """

    logs: Tensor

    def at(self, errors: Tensor) -> Tensor:
        """The ratio at some relative errors, of any shape; interpolated in logarithms."""
        wanted = errors.double().clamp_min(SMALLEST).log().cpu().numpy()
        found = np.interp(wanted, LEVELS.log().numpy(), self.logs.numpy())
        return torch.as_tensor(found).exp().to(errors)


def coherences(collected: Mapping[str, Mapping[str, Statistic]]) -> dict[str, CoherenceCurve]:
    """The curve of every site, at each level drawn towards the mean of all sites as far as chance explains it.

    With few samples `f/p` scatters, and a selector would take sites for cheap where it is too low by chance.

    Args:
        collected: Statistics by path of the site and name; sites without a `Coherence` are left out.
    """
    found = {path: own.get(Coherence.name) for path, own in collected.items()}
    kept = {path: each for path, each in found.items() if isinstance(each, Coherence) and each.total is not None}
    told = {path: each.ratios(LEVELS) for path, each in kept.items()}
    # where there is no rank to cut, only the loss of the whole layer was followed, which is like no cut of the others
    alone = {path for path, each in kept.items() if each.total is not None and each.total.shape[-1] < 3}
    whole = {path: CoherenceCurve(told.pop(path)[0]) for path in alone}
    if not told:
        return whole
    logs, variances = (torch.stack(each) for each in zip(*told.values(), strict=True))
    shrunk = torch.stack([shrunk_towards_mean(*level) for level in zip(logs.T, variances.T, strict=True)], dim=1)
    return {path: CoherenceCurve(row) for path, row in zip(told, shrunk, strict=True)} | whole

"""The best affine map from the compressed network's inputs to the original's outputs."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from rankfold.decompositions import Moments
from rankfold.linalg.whitening import (
    add_diagonal_,
    correlations,
    covariance,
    shrinkage,
    shrinkage_of,
    shrunk,
    solve_positive,
)
from rankfold.repair.moments import PairMoments, SplitMoments

STEP = 10.0  # factor from one ridge that is tried to the next
LARGEST = 100.0  # the last ridge that is tried; beyond it is the original weight itself


def centred(moments: PairMoments, group: int, *, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second moments a map is fitted with: covariances where a bias can absorb the means, raw moments otherwise.

    Returns:
        `S` (n, n), `C` (out, n), `E[x']` (n,), `E[y]` (out,).
    """
    n = max(moments.count, 1)
    second, crossed = moments.xx[group] / n, moments.yx[group] / n
    mean_x, mean_y = moments.x[group] / n, moments.y[group] / n
    if bias:
        second = second - torch.outer(mean_x, mean_x)
        crossed = crossed - torch.outer(mean_y, mean_x)
    return second, crossed, mean_x, mean_y


def ridge(
    moments: SplitMoments, group: int, weight: Tensor, *, bias: bool, strength: float, anchor: float = 1.0
) -> tuple[Tensor, float]:
    """Least squares with a ridge towards the original weight: `W_λ = W + (C − WS)(S + λ diag(S))⁻¹`.

    `λ` goes from `strength`, next to full least squares, to infinity, the original weight itself. It is the one whose
    `W_λ` from one half of the samples has the least error on the other, both ways, among `strength` times powers of
    ten; with all samples half of it is taken, since chance is half as large then. So a repair that few samples do not
    support is made weaker instead of discarded. `diag(S)` gives every input a ridge in its own scale.

    With an anchor `α` below 1 the target is `α y + (1 − α)(W x' + b)`, with the cross moment `C_α = α C + (1 − α) W S`.
    As `C_α − WS = α (C − WS)`, the change is `α` times that of `α = 1`, and the halves choose the same `λ`.

    Where the halves are not distinguished, `λ` is `ρ/(1 − ρ)` for the shrinkage `ρ` of `S`, at most features over
    samples.

    Args:
        moments: Moments of the fitted samples.
        group: Index of the group.
        weight: The original's `W`, shape (out, n).
        bias: True if a bias absorbs the means.
        strength: Least value of `λ`.
        anchor: Share `α`, in (0, 1].

    Returns:
        `W_λ`, shape (out, n), and `λ`. A site that saw only zeros keeps `W`, at infinity. Rank-deficient `S` is normal:
        in directions that the inputs never take, `W_λ` equals `W`.
    """
    chosen = _chosen(moments, group, weight, bias=bias, strength=strength)
    second, crossed, _, _ = centred(moments.fit, group, bias=bias)
    if math.isinf(chosen) or not float(second.diagonal().mean()) > 0:
        return weight.clone(), math.inf
    return weight + anchor * _change(second, crossed - weight @ second, chosen), chosen


def _chosen(moments: SplitMoments, group: int, weight: Tensor, *, bias: bool, strength: float) -> float:
    """`λ` for all samples."""
    if not moments.halved:
        second, _, _, _ = centred(moments.fit, group, bias=bias)
        rho = shrinkage(correlations(second)[0], moments.fit.count)
        return max(strength, min(rho / max(1 - rho, 1e-3), len(second) / max(moments.fit.count, 1)))
    sides = []
    for part in (moments.first, moments.second):
        second, crossed, _, _ = centred(part, group, bias=bias)
        sides.append((second, crossed - weight @ second))
    pairs = [(sides[0], sides[1]), (sides[1], sides[0])]

    levels = 1 + max(0, round(math.log(LARGEST / strength, STEP)))

    @cache
    def gain(step: int) -> float:
        if not 0 <= step < levels:
            return 0.0 if step == levels else math.inf
        return sum(_gain(_change(*fitted, strength * STEP**step), *judge) for fitted, judge in pairs)

    step = levels // 3  # downhill from there: the error falls with the ridge, and then grows
    while gain(step + 1) <= gain(step):
        step += 1
        if step == levels:
            return math.inf
    while gain(step - 1) < gain(step):
        step -= 1
    return max(strength, strength * STEP**step / 2)


def _gain(change: Tensor, second: Tensor, residual: Tensor) -> float:
    """`E‖y − (W + Δ)x‖² − E‖y − Wx‖² = ⟨Δ, ΔS⟩ − 2⟨Δ, C − WS⟩`."""
    return float((change * (change @ second - 2 * residual)).sum())


def _change(second: Tensor, residual: Tensor, level: float) -> Tensor:
    """`(C − WS)(S + λ diag(S))⁻¹`, in the scales of the inputs: the change, which is small, and not the weight.

    Args:
        second: Second moment `S`, shape (n, n).
        residual: Residual `C − WS`, shape (out, n).
        level: Ridge `λ`.
    """
    matrix, scales = correlations(second)
    silent = (scales == 0).to(matrix.dtype)  # inputs that are always 0: nothing is to be changed there
    return solve_positive(add_diagonal_(matrix, level + silent), (residual * scales).mT).mT * scales


def as_moments(moments: SplitMoments, group: int, *, bias: bool, gradient_gram: Tensor | None) -> Moments:
    """Moments of the same inputs, as a decomposition reads them: the covariance shrunk for its number of samples."""
    fit = moments.fit
    n = max(fit.count, 1)
    gram, mean = fit.xx[group] / n, fit.x[group] / n
    if moments.halved:
        halves = [centred(part, group, bias=True)[0] for part in (moments.first, moments.second)]
        _, rho = shrinkage_of(*halves)
    else:
        rho = shrinkage(correlations(covariance(gram, mean))[0], n)
    return Moments(shrunk(gram, mean, rho), mean, None, bias, gradient_gram)


def best_bias(moments: PairMoments, group: int, weight: Tensor, target: Tensor) -> Tensor:
    """The bias that makes the mean output the target's: `b = E[t] − W E[x']`.

    Args:
        moments: Moments of the fitted samples.
        group: Index of the group.
        weight: Weight `W`, shape (out, n).
        target: Mean target `E[t]`, shape (out,), from `mean_target`.
    """
    return target - weight @ (moments.x[group] / max(moments.count, 1))


def mean_target(moments: PairMoments, group: int, weight: Tensor, bias: Tensor | None, anchor: float) -> Tensor:
    """Mean of the target with an anchor `α`: `E[t] = α E[y] + (1 − α)(W E[x'] + b)`, shape (out,).

    Args:
        moments: Moments of the fitted samples.
        group: Index of the group.
        weight: The original's `W`, shape (out, n).
        bias: The original's `b`, shape (out,); None is 0.
        anchor: Share `α`, in (0, 1].
    """
    n = max(moments.count, 1)
    own = weight @ (moments.x[group] / n)
    own = own if bias is None else own + bias
    return anchor * (moments.y[group] / n) + (1 - anchor) * own

"""Empirical variational Bayes of a matrix: how much of it is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

TAU = 2.5129  # slope of the threshold in the square root of the aspect ratio
GRID = 64  # noise variances looked at, evenly in their logarithm, before the best is refined


@dataclass(frozen=True, eq=False)
class Denoised:
    """What a matrix holds beside noise.

    Attributes:
        rank: Number of singular values above the threshold.
        values: Those values, shrunk as the posterior mean has them, shape (rank,).
        variance: Variance σ² of the noise of an entry.
    """

    rank: int
    values: Tensor
    variance: float


def evbmf(values: Tensor, rows: int, columns: int, *, residual: float = 0.0) -> Denoised:
    """Global analytic solution of fully observed empirical variational Bayesian matrix factorisation.

    With `L = min(rows, columns)`, `M = max(…)`, `α = L/M`, `τ̄ = 2.5129 √α`, `x̄ = (1 + τ̄)(1 + α/τ̄)`, the variance of the
    noise minimises, over `x_h = γ_h²/(M σ²)`,

        Ω(σ²) = Σ_{x ≤ x̄} (x − ln x) + Σ_{x > x̄} [x − τ(x) + ln((τ(x) + 1)/x) + α ln(τ(x)/α + 1)]
                + ρ/(M σ²) + (L − H) ln σ²,
        τ(x) = ½ (x − (1 + α) + √((x − (1 + α))² − 4α)),

    and the rank is the number of values above `√(M σ² x̄)`. Values are divided by their root mean square first, so the
    rank does not depend on the matrix's scale.

    Args:
        values: Singular values γ of the matrix, descending, shape (H,), H ≤ L.
        rows: Number of rows.
        columns: Number of columns.
        residual: Energy ρ of the matrix that is not in `values`.

    Returns:
        Rank, shrunk values and variance; rank 0 for a matrix of zeros.

    References:
        Nakajima, Sugiyama, Babacan, Tomioka, JMLR 14, 2013, theorem 2 and corollary 1. We differ in the search for the
        variance: Ω may have several minima, so a grid comes before the bounded search.
    """
    small, large = min(rows, columns), max(rows, columns)
    gamma = values.detach().double().cpu()
    energy = float(gamma.square().sum()) + residual
    if not energy > 0:
        return Denoised(0, values[:0], 0.0)
    unit = math.sqrt(energy / (small * large))
    squares, rest = (gamma / unit).square(), residual / unit**2
    alpha = small / large
    tau_bar = TAU * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    def free_energy(variance: float) -> float:
        x = (squares / (large * variance)).clamp_min(1e-300)
        noise, signal = x[x <= x_bar], x[x > x_bar]
        shifted = signal - (1 + alpha)
        tau = (shifted + (shifted.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
        terms = (noise - noise.log()).sum()
        terms += (signal - tau + ((tau + 1) / signal).log() + alpha * (tau / alpha + 1).log()).sum()
        return float(terms) + rest / (large * variance) + (small - len(squares)) * math.log(variance)

    low, high = _bounds(squares, rest, small, large, x_bar)
    variance = _least(free_energy, low, high)
    threshold = large * variance * x_bar
    kept = squares[squares > threshold]
    ratio = 1 - (small + large) * variance / kept
    root = (ratio.square() - 4 * small * large * variance**2 / kept.square()).clamp_min(0).sqrt()
    shrunk = kept.sqrt() / 2 * (ratio + root) * unit
    return Denoised(len(kept), shrunk.to(values), variance * unit**2)


def _bounds(squares: Tensor, residual: float, small: int, large: int, x_bar: float) -> tuple[float, float]:
    """The least and the largest variance that can be best."""
    high = (float(squares.sum()) + residual) / (small * large)
    noise = min(math.ceil(small / (1 + small / large)) - 1, len(squares))  # the first value that is noise in any case
    tail = squares[noise:]
    low = 0.0
    if len(tail):
        low = max(float(tail[0]) / (large * x_bar), float(tail.mean()) / large)
    return max(low, high * 1e-12), high


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """The least place of a function of a positive number between two bounds: the best of a grid, refined."""
    from scipy.optimize import minimize_scalar  # here, since importing it changes the filters of warnings

    if not high > low:
        return high
    step = (math.log(high) - math.log(low)) / (GRID - 1)
    places = [low * math.exp(step * i) for i in range(GRID)]
    best = min(range(GRID), key=lambda i: function(places[i]))
    around = math.log(places[max(best - 1, 0)]), math.log(places[min(best + 1, GRID - 1)])
    found = minimize_scalar(lambda x: function(math.exp(x)), bounds=around, method="bounded", options={"xatol": 1e-10})
    return min(math.exp(float(found.x)), places[best], key=function)

"""The best affine map from the compressed network's inputs to the original's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.decompositions import Moments
from rankfold.linalg.whitening import add_diagonal_, shrinkage, shrunk
from rankfold.repair.moments import PairMoments


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


def ridge(moments: PairMoments, group: int, weight: Tensor, *, bias: bool, strength: float) -> Tensor:
    """Least squares with a ridge towards the original weight: `W* = (C + λW)(S + λI)⁻¹`.

    Args:
        moments: Of the fitted samples.
        group: Which group.
        weight: The original's `W`, shape (out, n).
        bias: Whether a bias absorbs the means.
        strength: Least `λ` relative to the mean diagonal of `S`. With few samples the shrinkage of `S` asks for more,
            up to features over samples: where `S` is nearly a multiple of the identity it may be shrunk wholly at no
            loss, which says nothing about how far `W` is to be trusted.

    Returns:
        `W*`, shape (out, n). A site that saw only zeros keeps `W`. Rank-deficient `S` is normal: in directions that
        the inputs never take, `W*` equals `W`.
    """
    second, crossed, _, _ = centred(moments, group, bias=bias)
    mean = second.diagonal().mean()
    if not float(mean) > 0:
        return weight.clone()
    rho = shrinkage(second, moments.count)
    few = min(rho / max(1 - rho, 1e-3), len(second) / max(moments.count, 1))
    damping = max(strength, few) * mean
    # (W* − W)(S + λI) = C − W S: solve for the change, which is small, not for the weight.
    right = (crossed - weight @ second).mT
    return weight + _solve(add_diagonal_(second, damping), right).mT


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """`M⁻¹R` of a symmetric `M`: by Cholesky, a third of the work, and by LU where rounding left it indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return torch.cholesky_solve(right, factor)
    solved: Tensor = torch.linalg.solve(matrix, right)
    return solved


def as_moments(moments: PairMoments, group: int, *, bias: bool, gradient_gram: Tensor | None) -> Moments:
    """The same inputs, as a decomposition reads them."""
    n = max(moments.count, 1)
    mean = moments.x[group] / n
    return Moments(shrunk(moments.xx[group] / n, mean, n), mean, None, bias, gradient_gram)


def best_bias(moments: PairMoments, group: int, weight: Tensor) -> Tensor:
    """The bias that makes the mean output the target's: `b = E[y] − W E[x']`."""
    n = max(moments.count, 1)
    return moments.y[group] / n - weight @ (moments.x[group] / n)

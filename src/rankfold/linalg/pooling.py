"""Several quadratic forms as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pooled(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair `(G, A)` whose `tr(G D A Dᵀ)` stands for `Σ tr(G_i D A_i Dᵀ)`.

    `G = Σ w_i G_i/tr G_i` and `A ∝ Σ w_i A_i/tr A_i`, with `w_i ∝ tr G_i · tr A_i`, and in such a scale that both are
    equal for `D = I`. It is the sum itself where all `G_i`, or all `A_i`, are multiples of each other; no pair of
    matrices is in general.

    Args:
        pairs: `G_i`, shape (m, m), and `A_i`, shape (n, n), without negative eigenvalues; m = n.

    Returns:
        `G` and `A`; pairs of which one matrix is 0 count nothing, and where all are so, the first pair is returned.
    """
    sizes = [(float(first.trace()), float(second.trace())) for first, second in pairs]
    kept = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if size[0] > 0 and size[1] > 0]
    if not kept:
        return pairs[0]
    total = sum(left * right for _, (left, right) in kept)
    weighting = sum((first * (right / total) for (first, _), (_, right) in kept), 0 * kept[0][0][0])
    gram = sum((second * (left / total) for (_, second), (left, _) in kept), 0 * kept[0][0][1])
    whole = sum(float((first * second).sum()) for (first, second), _ in kept)
    mine = float((weighting * gram).sum())
    return weighting, gram * (whole / mine if mine > 0 else 1.0)

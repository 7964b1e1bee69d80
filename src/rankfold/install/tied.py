"""The map of a head whose table was replaced: from the head's input to the r numbers that the table multiplies."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rankfold.factors import Factors, MatrixFactors, PivotedFactors
from rankfold.layers import tensor
from rankfold.linalg.precision import widen

DAMPING = 1e-10  # share of the mean diagonal: a rank-deficient Gram is the normal case


def span_of(table: Tensor, shared: Tensor) -> Tensor:
    """`B` with `T = E B`, shape (d, r): by least squares, since a table is stored in its own precision.

    Args:
        table: Original table `E`, shape (V, d).
        shared: Table `T` that replaces it, shape (V, r).
    """
    wide = widen(table)
    return solved(wide.mT @ wide, wide.mT @ widen(shared))


def head_map(table: Tensor, shared: Tensor, metric: Tensor | None, target: Tensor | None = None) -> Tensor:
    """The map `R` (r × d) with which `T R h` is closest to `E X h` for every `h`: `R = (BᵀMB)⁻¹ BᵀM X`, `T = E B`.

    Args:
        table: Original table `E`, shape (V, d).
        shared: Table `T`, shape (V, r).
        metric: `M = Eᵀ G E`, with the Gram `G` of the gradients at the head's outputs; None is `G = I`.
        target: `X`, shape (d, d); None is the identity.

    Returns:
        `R`, in the work dtype; the identity for `T = E`.
    """
    wide, span = widen(table), span_of(table, shared)
    weighted = span.mT @ (wide.mT @ wide if metric is None else metric.to(span))
    return solved(weighted @ span, weighted if target is None else weighted @ target.to(span))


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """`M⁻¹X` of a symmetric `M` without negative eigenvalues, damped by `DAMPING`; 0 for `M = 0`."""
    level = DAMPING * matrix.diagonal().mean()
    eye = torch.eye(len(matrix)).to(matrix)
    result: Tensor = torch.linalg.solve(matrix + eye * (level if float(level) > 0 else 1.0), right)
    return result


def fill_head(built: nn.Module, head: nn.Module, metric: Tensor | None) -> None:
    """Fill the first layer of a head's replacement, whose table is filled already.

    Args:
        built: Replacement from `build_head`.
        head: The original head.
        metric: Metric of the inputs, as for `head_map`.
    """
    first, last = built.children()
    with torch.no_grad():
        tensor(first, "weight").copy_(head_map(tensor(head, "weight"), tensor(last, "weight"), metric))


def for_lookups(factors: Factors, gram: Tensor) -> Factors:
    """Factors `L R` with the best `L` for the vectors that are looked up: `L = A Rᵀ (R A Rᵀ)⁻¹` for every weighting.

    `R`, which makes the table, was chosen for both ends; `L` serves one of them.

    Args:
        factors: Factors of the identity.
        gram: Second moment `A` of the vectors, shape (d, d).
    """
    if isinstance(factors, PivotedFactors):
        return replace(factors, base=for_lookups(factors.base, gram))
    if not isinstance(factors, MatrixFactors):
        raise TypeError(f"factors of a table are no {type(factors).__name__}")
    right = widen(factors.right)
    turned = right @ gram.to(right)
    return replace(factors, left=solved(turned @ right.mT, turned).mT)

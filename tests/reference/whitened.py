"""Slow, obvious versions of the whitened decompositions, in NumPy, from explicit inputs instead of their moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def best_map(weight: Array, inputs: Array, rank: int) -> Array:
    """The map of a rank whose outputs on the inputs are nearest to the weight's: Eckart–Young on the outputs.

    Args:
        weight: (out, n).
        inputs: (positions, n), spanning all n directions.
        rank: Of the result.
    """
    outputs = weight @ inputs.T
    u, s, vh = np.linalg.svd(outputs, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
    solved, *_ = np.linalg.lstsq(inputs, nearest.T, rcond=None)
    result: Array = solved.T
    return result


def refitted(weight: Array, patches: Array, first: Array) -> Array:
    """The second stage that is best on the patches, given the first, by least squares.

    Args:
        weight: (out, a, b).
        patches: (positions, a, b).
        first: (r, a): what the first stage makes of every column of a patch.

    Returns:
        (out, r, b).
    """
    features = np.einsum("ra,pab->prb", first, patches).reshape(len(patches), -1)
    outputs = np.einsum("oab,pab->po", weight, patches)
    solved, *_ = np.linalg.lstsq(features, outputs, rcond=None)
    result: Array = solved.T.reshape(weight.shape[0], first.shape[0], weight.shape[2])
    return result


def relative_error(weight: Array, other: Array, inputs: Array) -> float:
    """Mean squared difference of the outputs over the mean squared output, position by position."""
    lost = total = 0.0
    for each in inputs:
        lost += float(np.square((weight - other) @ each).sum())
        total += float(np.square(weight @ each).sum())
    return lost / total

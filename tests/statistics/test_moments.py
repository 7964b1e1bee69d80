"""First and second moments against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankfold.statistics import GradientGram, InputGram, InputMean, OutputGram
from rankfold.testing.matrices import normal

INPUTS, OUTPUTS = normal(2, 60, 5, seed=1), normal(2, 60, 3, seed=2)


def test_the_input_gram_is_the_mean_outer_product() -> None:
    statistic = InputGram()
    statistic.update(INPUTS)
    expected = [np.mean([np.outer(row, row) for row in group], axis=0) for group in INPUTS.numpy()]
    np.testing.assert_allclose(statistic.mean().numpy(), expected, rtol=0, atol=1e-13)


def test_the_input_mean_is_the_mean() -> None:
    statistic = InputMean()
    statistic.update(INPUTS)
    np.testing.assert_allclose(statistic.mean().numpy(), INPUTS.numpy().mean(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [OutputGram, GradientGram])
def test_grams_of_what_leaves_a_site_are_mean_outer_products(kind: type[OutputGram | GradientGram]) -> None:
    statistic = kind()
    statistic.update(INPUTS, OUTPUTS)
    expected = [np.mean([np.outer(row, row) for row in group], axis=0) for group in OUTPUTS.numpy()]
    np.testing.assert_allclose(statistic.mean().numpy(), expected, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=kind.name):
        kind().update(INPUTS, None)


def test_sums_of_half_precision_are_as_exact_as_the_values() -> None:
    half = INPUTS.half()
    gram, mean = InputGram(), InputMean()
    for chunk in half.split(1, dim=1):
        gram.update(chunk)
        mean.update(chunk)
    exact = half.double()
    torch.testing.assert_close(gram.mean(), exact.mT @ exact / 60, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.mean(), exact.mean(1), rtol=1e-12, atol=1e-12)


def test_many_small_summands_are_not_lost_beside_a_large_one() -> None:
    # In float32 1 + 1e-8 is 1; ten million times that would be lost.
    mean = InputMean()
    mean.update(torch.ones(1, 1, 1))
    for _ in range(100):
        mean.update(torch.full((1, 1000, 1), 1e-8))
    assert mean.total is not None
    assert float(mean.total) == pytest.approx(1 + 1e-3, abs=1e-9)

"""Whitened SVD against a slow version that looks at every input instead of their moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference.whitened import best_map, refitted, relative_error
from torch import Tensor

from rankfold.decompositions import SVD, Decomposition, Moments, SpatialSVD, WhitenedSVD
from rankfold.errors import DataError, OptionError
from rankfold.testing.matrices import normal


def inputs_and_moments(n: int, seed: int, *, bias: bool = False, count: int = 120) -> tuple[Tensor, Moments]:
    """Correlated inputs with a mean, and their moments."""
    inputs = normal(count, n, seed=seed) @ normal(n, n, seed=seed + 1) + 2 * normal(1, n, seed=seed + 2)
    return inputs, Moments(inputs.mT @ inputs / count, inputs.mean(0), bias=bias)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_it_is_the_best_map_of_its_rank(out: int, n: int, seed: int, bias: bool) -> None:
    weight = normal(out, n, seed=seed)
    inputs, moments = inputs_and_moments(n, seed + 1, bias=bias)
    seen = inputs - inputs.mean(0) if bias else inputs  # a bias absorbs the mean
    method = WhitenedSVD(damping=0.0)
    errors = method.errors(weight, moments)
    for rank in method.ranks(weight.shape):
        found = method.decompose(weight, rank, moments).reconstruct().numpy()
        best = best_map(weight.numpy(), seen.numpy(), rank)
        lost = relative_error(weight.numpy(), best, seen.numpy())
        assert relative_error(weight.numpy(), found, seen.numpy()) == pytest.approx(lost, abs=1e-9)
        assert float(errors[rank - 1]) == pytest.approx(lost, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_map_itself_equals_the_slow_one(rank: int) -> None:
    weight = normal(6, 8, seed=1)
    inputs, moments = inputs_and_moments(8, 2)
    found = WhitenedSVD(damping=0.0).decompose(weight, rank, moments).reconstruct()
    np.testing.assert_allclose(found.numpy(), best_map(weight.numpy(), inputs.numpy(), rank), rtol=0, atol=1e-8)


@given(st.integers(0, 99))
def test_plain_svd_is_never_better_on_the_inputs(seed: int) -> None:
    weight = normal(5, 3, 2, 2, seed=seed)
    inputs, moments = inputs_and_moments(12, seed + 1)
    for rank in range(1, 6):
        whitened, plain = (
            relative_error(
                weight.flatten(1).numpy(),
                method.decompose(weight, rank, moments).reconstruct().flatten(1).numpy(),
                inputs.numpy(),
            )
            for method in (WhitenedSVD(), SVD())
        )
        assert whitened <= plain + 1e-6


def test_white_inputs_give_plain_svd() -> None:
    weight = normal(6, 4, 3, seed=3)
    white = Moments(7 * torch.eye(12, dtype=torch.float64))
    for mirrored in (False, True):
        found, expected = (
            method.decompose(weight, 2, white).reconstruct() for method in (WhitenedSVD(mirrored), SVD(mirrored))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [WhitenedSVD(mirrored=True, damping=0.0), SpatialSVD(damping=0.0)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_second_stage_is_the_least_squares_fit_on_the_patches(method: Decomposition, rank: int) -> None:
    weight = normal(5, 4, 3, 2, seed=4)
    inputs, moments = inputs_and_moments(24, 5)
    factors = method.decompose(weight, rank, moments)
    if method.form == "mirrored":
        first, split, patches = factors.right.flatten(1), weight.flatten(2), inputs.reshape(-1, 4, 6)
    else:
        first, split, patches = factors.right.flatten(1), weight.reshape(5, 12, 2), inputs.reshape(-1, 12, 2)
    best = refitted(split.numpy(), patches.numpy(), first.numpy())
    expected = np.einsum("orb,ra->oab", best, first.numpy()).reshape(5, 24)
    np.testing.assert_allclose(factors.reconstruct().flatten(1).numpy(), expected, rtol=0, atol=1e-7)


@given(st.integers(1, 6), st.integers(0, 99))
def test_inputs_of_low_rank_need_no_more_than_their_rank(rank: int, seed: int) -> None:
    inputs = normal(50, rank, seed=seed) @ normal(rank, 9, seed=seed + 1)
    moments = Moments(inputs.mT @ inputs / 50, inputs.mean(0))
    weight = normal(7, 9, seed=seed + 2)
    found = WhitenedSVD().decompose(weight, rank, moments).reconstruct()
    np.testing.assert_allclose((inputs @ found.mT).numpy(), (inputs @ weight.mT).numpy(), rtol=0, atol=1e-3)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight = normal(6, 4, 3, 3, seed=6)
    _, moments = inputs_and_moments(36, 7)
    for method in (WhitenedSVD(), WhitenedSVD(mirrored=True), SpatialSVD()):
        expected = method.decompose(weight, 3, moments).reconstruct()
        for scale in (1e20, 1e-20):
            scaled = Moments(moments.gram * scale**2, moments.mean * scale)
            found = method.decompose(weight, 3, scaled).reconstruct()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_the_metric_is_the_covariance_where_a_bias_absorbs_the_mean() -> None:
    inputs, moments = inputs_and_moments(5, 8, bias=True)
    torch.testing.assert_close(moments.metric(WhitenedSVD()), torch.cov(inputs.mT, correction=0))
    _, without = inputs_and_moments(5, 8, bias=False)
    assert torch.equal(without.metric(WhitenedSVD()), without.gram)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constant_inputs_have_no_covariance(dtype: torch.dtype) -> None:
    inputs = (1e3 * normal(1, 5, seed=9)).to(dtype).expand(200, 5)
    gram = (inputs.mT @ inputs / 200).double()
    moments = Moments(gram, inputs.mean(0).double(), bias=True)
    assert torch.equal(moments.metric(WhitenedSVD()), torch.zeros(5, 5, dtype=torch.float64))


@pytest.mark.parametrize("damping", [-1e-9, 1.5, float("nan"), True, "0.1", None])
@pytest.mark.parametrize("method", [WhitenedSVD, SpatialSVD])
def test_damping_is_a_fraction(method: type[WhitenedSVD | SpatialSVD], damping: object) -> None:
    with pytest.raises(OptionError, match="0 to 1"):
        method(damping=damping)  # type: ignore[arg-type]


def test_missing_moments_are_named_with_what_to_do() -> None:
    with pytest.raises(DataError, match="collect"):
        WhitenedSVD().errors(normal(3, 3, seed=1), Moments())

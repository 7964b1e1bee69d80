"""Square roots and pseudo-inverses of Grams, against SciPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.errors import NumericsError
from rankfold.linalg.svd import exact_svd
from rankfold.linalg.whitening import (
    cholesky,
    damped_gram,
    left_spectrum,
    pseudo_inverse,
    scales_shrinkage,
    shrinkage,
    shrinkage_of,
    shrunk,
    square_root,
    symmetric_eigen,
    with_even_scales,
)
from rankfold.testing.matrices import normal

EYE = torch.eye(6, dtype=torch.float64)


def gram_of(rank: int, n: int = 6, *, seed: int = 1, scale: float = 1.0) -> Tensor:
    rows = normal(rank, n, seed=seed)
    return rows.mT @ rows * scale


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


@given(st.integers(0, 12), st.integers(1, 8), st.integers(0, 99), st.sampled_from([1.0, 1e40, 1e-40]))
def test_eigenvalues_equal_scipy_s_and_are_never_negative(rank: int, n: int, seed: int, scale: float) -> None:
    gram = gram_of(rank, n, seed=seed, scale=scale)
    values, vectors = symmetric_eigen(gram)
    assert bool((values >= 0).all())
    size = max(float(gram.abs().max()), 1e-300)
    expected = scipy.linalg.eigvalsh(gram.numpy() / size)
    np.testing.assert_allclose(values.numpy() / size, expected.clip(0), rtol=0, atol=1e-12)
    close((vectors * values) @ vectors.mT, gram, 1e-12)


def test_rounding_that_breaks_symmetry_does_no_harm() -> None:
    gram = gram_of(9)
    skew = normal(6, 6, seed=2) * 1e-10
    close(symmetric_eigen(gram + skew - skew.mT)[0], symmetric_eigen(gram)[0], 1e-13)


@given(st.integers(6, 12), st.integers(0, 99), st.sampled_from([1.0, 1e40, 1e-40]), st.sampled_from([0.0, 1e-6, 0.5]))
def test_the_root_of_a_full_gram_equals_scipy_s(rank: int, seed: int, scale: float, damping: float) -> None:
    gram = gram_of(rank, seed=seed, scale=scale) + scale * EYE
    mean = float(gram.trace()) / 6
    expected = scipy.linalg.sqrtm((gram + damping * mean * EYE).numpy() / scale).real * scale**0.5
    root, inverse_root = square_root(gram, damping=damping)
    close(root, torch.from_numpy(expected))
    close(root @ inverse_root, EYE)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1e40, 1e-40], ids=str)
def test_without_damping_the_inverse_is_on_the_range_only(rank: int, scale: float) -> None:
    gram = gram_of(rank, scale=scale)
    root, inverse_root = square_root(gram, damping=0.0)
    close(root @ root, gram, 1e-12)
    projector = gram @ torch.from_numpy(scipy.linalg.pinvh(gram.numpy() / scale, rtol=1e-10)) / scale
    close(root @ inverse_root, projector)
    close(inverse_root @ gram @ inverse_root, projector)


@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from([1.0, 1e40, 1e-40]))
def test_the_pseudo_inverse_equals_scipy_s(rank: int, seed: int, scale: float) -> None:
    gram = gram_of(rank, seed=seed)
    expected = scipy.linalg.pinvh(gram.numpy(), rtol=1e-12)
    found = pseudo_inverse(gram * scale).numpy() * scale
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_damping_is_relative_to_the_mean_eigenvalue() -> None:
    gram = gram_of(2)
    for scale in (1.0, 1e30):
        root, _ = square_root(gram * scale, damping=0.25)
        close(root @ root, scale * (gram + 0.25 * gram.trace() / 6 * EYE))
        close(root @ root, damped_gram(gram * scale, damping=0.25))
    close(pseudo_inverse(gram, damping=0.25), torch.linalg.inv(damped_gram(gram, damping=0.25)))


def test_a_zero_gram_gives_identities() -> None:
    zero = torch.zeros(6, 6)
    for damping in (0.0, 1e-6):
        for found in (*square_root(zero, damping=damping), pseudo_inverse(zero), damped_gram(zero, damping=damping)):
            assert torch.equal(found, EYE)


def test_a_gram_that_rounding_made_indefinite_is_the_normal_case() -> None:
    gram = gram_of(3) - 1e-14 * EYE
    root, inverse_root = square_root(gram, damping=0.0)
    assert bool(torch.isfinite(root).all())
    close(root @ root, gram_of(3), 1e-12)
    assert bool(torch.isfinite(inverse_root).all())


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1.0, 1e20, 1e-20])
)
def test_the_left_spectrum_is_that_of_the_whitened_weight(out: int, n: int, rank: int, seed: int, scale: float) -> None:
    weight, gram = normal(out, n, seed=seed) * scale, gram_of(rank, n, seed=seed + 1, scale=scale**2)
    root, _ = square_root(gram, damping=1e-3)
    whitened = weight @ root
    u, s = left_spectrum(weight, gram, damping=1e-3)
    k = min(out, n)
    assert (u.shape, s.shape) == ((out, k), (k,))
    close(u.mT @ u, torch.eye(k, dtype=torch.float64), 1e-12)
    _, expected, _ = exact_svd(whitened)
    close(s.square(), expected.square(), 1e-12)
    # What the first r left vectors leave of the whitened weight is the tail of its spectrum.
    for r in range(k + 1):
        left = whitened - u[:, :r] @ (u[:, :r].mT @ whitened)
        assert float(left.square().sum()) == pytest.approx(
            float(expected[r:].square().sum()), abs=1e-11 * float(expected.square().sum())
        )


def test_cholesky_equals_scipy_s_and_serves_every_leading_block() -> None:
    gram = gram_of(9)
    factor = cholesky(gram)
    close(factor, torch.from_numpy(scipy.linalg.cholesky(gram.numpy(), lower=True)), 1e-12)
    for size in range(1, 7):
        close(factor[:size, :size] @ factor[:size, :size].mT, gram[:size, :size], 1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e40, 1e-40], ids=str)
def test_cholesky_of_a_singular_gram_is_damped_as_little_as_can_be(rank: int, scale: float) -> None:
    gram = gram_of(rank, scale=scale) if rank else torch.zeros(6, 6, dtype=torch.float64)
    factor = cholesky(gram)
    assert bool(torch.isfinite(factor).all())
    assert float((factor @ factor.mT - gram).abs().max()) <= 1e-13 * max(float(gram.abs().max()), 1.0)


@pytest.mark.parametrize("matrix", [-EYE, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((3, 3), -1e-300)])
def test_cholesky_ends_on_what_is_no_gram_at_all(matrix: Tensor) -> None:
    assert bool(torch.isfinite(cholesky(matrix)).all())


def test_cholesky_refuses_what_is_not_finite() -> None:
    with pytest.raises(NumericsError, match="every element is finite"):
        cholesky(torch.full((2, 2), float("nan")))


@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 500), st.integers(0, 99))
def test_shrinkage_is_the_oracle_approximating_one(p: int, rank: int, count: int, seed: int) -> None:
    gram = gram_of(rank, p, seed=seed).numpy()
    squares, trace = float(np.trace(gram @ gram)), float(np.trace(gram))
    upper = (1 - 2 / p) * squares + trace**2
    lower = (count + 1 - 2 / p) * (squares - trace**2 / p)
    expected = min(1.0, upper / lower) if lower > 0 else 1.0
    for scale in (1.0, 1e40, 1e-40):
        assert shrinkage(torch.from_numpy(gram) * scale, count) == pytest.approx(expected, rel=1e-9)


def test_shrinkage_vanishes_as_samples_grow_and_stays_away_from_nothing() -> None:
    gram = gram_of(9)
    found = [shrinkage(gram, count) for count in (1, 10, 100, 10**9)]
    assert found[0] == 1
    assert all(after < before for before, after in pairwise(found))
    assert found[-1] < 1e-7
    assert shrinkage(torch.zeros(6, 6), 10) == 0
    assert shrinkage(EYE, 10) == 1
    assert shrinkage(gram_of(3, 1), 10) == 0


@pytest.mark.parametrize("centred", [True, False])
def test_shrinking_keeps_every_scale_and_the_mean(centred: bool) -> None:
    rows = normal(4, 6, seed=3) * torch.logspace(-3, 2, 6, dtype=torch.float64) + 5
    gram, mean = rows.mT @ rows / 4, rows.mean(0) if centred else None
    found = shrunk(gram, mean, 0.25)
    centre = torch.outer(mean, mean) if mean is not None else torch.zeros_like(gram)
    close(found.diagonal(), gram.diagonal(), 1e-12)
    scales = (gram - centre).diagonal().rsqrt()
    correlations = (found - centre) * scales * scales[:, None]
    assert float(torch.linalg.eigvalsh(correlations).min()) > 0.2  # four samples of six features, none is free
    close(shrunk(gram, mean, 0.0), gram, 1e-12)
    close(shrunk(gram, mean, 1.0) - centre, (gram - centre).diagonal().diag(), 1e-9)


def halves(true: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Covariances of two halves of `count` samples with a true covariance."""
    rows = normal(count, len(true), seed=seed) @ cholesky(true).mT
    first, second = rows[::2], rows[1::2]
    return first.mT @ first / len(first), second.mT @ second / len(second)


@pytest.mark.parametrize("count", [20, 60, 400])
def test_shrinkage_of_halves_is_nearly_as_good_as_the_best_there_is(count: int) -> None:
    """Against the shrinkage that is closest to the true correlations, which only a test can know."""
    factor = normal(30, 5, seed=1)
    true = factor @ factor.mT + torch.eye(30)
    scales = torch.logspace(-4, 4, 30, dtype=torch.float64)
    wanted = true * true.diagonal().rsqrt() * true.diagonal().rsqrt()[:, None]
    wanted = wanted - wanted.diagonal().diag()
    lost, least, unshrunk = 0.0, 0.0, 0.0
    for seed in range(20):
        first, second = halves(true * scales * scales[:, None], count, seed=seed + 10)
        sample = (first + second) / 2
        level = sample.diagonal().rsqrt()
        mine = sample * level * level[:, None]
        mine = mine - mine.diagonal().diag()
        best = float((mine * wanted).sum() / mine.square().sum())
        for share in (1 - shrinkage_of(first, second)[1], best):
            assert 0 <= share <= 1.1
        lost += float(((1 - shrinkage_of(first, second)[1]) * mine - wanted).square().sum())
        least += float((best * mine - wanted).square().sum())
        unshrunk += float((mine - wanted).square().sum())
    assert lost <= 1.15 * least  # at twenty samples of thirty features the halves are ten each
    assert lost < unshrunk


def test_shrinkage_of_halves_knows_no_scale_and_trusts_halves_that_agree() -> None:
    first, second = halves(gram_of(9), 24, seed=3)
    level = torch.logspace(-8, 8, 6, dtype=torch.float64)
    scaled = [each * level * level[:, None] for each in (first, second)]
    assert shrinkage_of(*scaled) == pytest.approx(shrinkage_of(first, second))
    assert shrinkage_of(first, first) == (0.0, 0.0)
    assert shrinkage_of(EYE, EYE) == (0.0, 0.0)
    assert shrinkage_of(torch.zeros(3, 3), torch.zeros(3, 3)) == (0.0, 0.0)
    of_half, of_all = shrinkage_of(first, second)
    assert 0 < of_all < of_half < 1


def test_positions_that_repeat_within_a_sample_are_no_new_samples() -> None:
    """The halves see through copies; a formula that counts rows does not."""
    rows = normal(12, 6, seed=5)
    few = [each.mT @ each / 6 for each in (rows[::2], rows[1::2])]
    many = [each.repeat(50, 1).mT @ each.repeat(50, 1) / 300 for each in (rows[::2], rows[1::2])]
    assert shrinkage_of(*many) == pytest.approx(shrinkage_of(*few))
    assert shrinkage(sum(many) / 2, 600) < 0.1 * shrinkage(sum(few) / 2, 12)  # type: ignore[arg-type]


def test_scales_of_chance_are_shrunk_towards_each_other_and_true_ones_are_not() -> None:
    """Of few draws, inputs of one scale seem to have many; scales that both halves see stay as they are."""
    draw = torch.Generator().manual_seed(0)
    level = torch.logspace(-3, 3, 40, dtype=torch.float64)
    for true, bounds in ((torch.ones(40, dtype=torch.float64), (0.5, 1.0)), (level, (0.0, 0.05))):
        first, second = (
            torch.diag((torch.randn(6, 40, generator=draw).double() * true.sqrt()).square().mean(0)) for _ in range(2)
        )
        of_half, of_all = scales_shrinkage(first, second)
        assert bounds[0] <= of_all <= of_half <= bounds[1]
        mean = (first + second) / 2
        found = with_even_scales(mean, of_all)
        assert float(found.trace()) == pytest.approx(float(mean.trace()))
        off = (found.diagonal().log() - true.log()).std()
        assert float(off) <= float((mean.diagonal().log() - true.log()).std()) * (0.7 if bounds[1] == 1.0 else 1.01)


def test_even_scales_keep_correlations_and_zeros() -> None:
    gram = gram_of(9)
    gram[2], gram[:, 2] = 0, 0
    found = with_even_scales(gram, 1.0)
    live = torch.arange(6) != 2
    torch.testing.assert_close(found.diagonal()[live], found.diagonal()[live].mean().expand(5))
    own, mine = (
        each[live][:, live] / each.diagonal()[live].sqrt().outer(each.diagonal()[live].sqrt()) for each in (gram, found)
    )
    torch.testing.assert_close(mine, own)
    assert float(found[2].abs().sum()) == 0
    assert with_even_scales(gram, 0.0) is gram
    assert scales_shrinkage(torch.zeros(3, 3), torch.zeros(3, 3)) == (0.0, 0.0)

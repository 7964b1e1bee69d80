"""Interpolative decomposition against SciPy, least squares and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.errors import DataError, OptionError
from rankfold.linalg.interpolative import (
    backward_elimination,
    folded,
    interpolation,
    pivoted_cholesky,
    pivoted_qr,
    strong_rrqr,
)
from rankfold.testing.matrices import normal


def _low_rank(rows: int, columns: int, rank: int, seed: int) -> Tensor:
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_pivots_of_blocks_are_those_of_the_whole(blocks: int) -> None:
    z = normal(120, 9, seed=0) * torch.logspace(0, -3, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(1))]
    r, pivots = scipy.linalg.qr(z.numpy(), mode="r", pivoting=True)
    found, lengths = pivoted_qr(z.chunk(blocks))
    np.testing.assert_array_equal(found.numpy(), pivots)
    np.testing.assert_allclose(lengths.numpy(), np.abs(np.diagonal(r)), rtol=1e-10)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 50))
def test_the_gram_has_the_pivots_of_the_columns(rows: int, columns: int, seed: int) -> None:
    z = normal(rows, columns, seed=seed)
    pivots, lengths = pivoted_qr([z])
    found, found_lengths = pivoted_cholesky(z.mT @ z)
    rank = min(rows, columns)
    clear = int((lengths > 1e-4 * lengths[0]).sum())
    assert sorted(found.tolist()) == list(range(columns))
    np.testing.assert_array_equal(found[:clear].numpy(), pivots[:clear].numpy())
    np.testing.assert_allclose(found_lengths[:clear].numpy(), lengths[:clear].numpy(), rtol=1e-6)
    assert float(found_lengths[rank:].abs().max() if columns > rank else 0) <= 1e-6 * float(lengths[0])


def test_no_block_is_refused() -> None:
    with pytest.raises(DataError, match="at least one block of rows"):
        pivoted_qr([])


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_the_interpolation_is_least_squares(scale: float) -> None:
    z = normal(60, 8, seed=2) * scale
    kept = [5, 0, 3]
    t = interpolation(z.mT @ z, kept)
    expected = np.linalg.lstsq(z[:, kept].numpy(), z.numpy(), rcond=None)[0]
    np.testing.assert_allclose(t.numpy(), expected, atol=1e-8)
    assert torch.equal(t[:, kept], torch.eye(3, dtype=t.dtype))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e20])
def test_a_folded_weight_is_the_weight_by_the_interpolation(scale: float, damping: float) -> None:
    z, weight = normal(60, 8, seed=2) * scale, normal(3, 8, seed=3)
    gram, kept = z.mT @ z, [5, 0, 3]
    got = folded(weight, gram, kept, damping=damping)
    torch.testing.assert_close(got, weight.double() @ interpolation(gram, kept, damping=damping).mT)


def test_columns_that_are_combinations_of_the_kept_come_back_exactly() -> None:
    z = _low_rank(50, 10, 4, seed=3)
    pivots, _ = pivoted_cholesky(z.mT @ z)
    t = interpolation(z.mT @ z, pivots[:4])
    torch.testing.assert_close(z[:, pivots[:4]] @ t, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "constant column", "fewer rows than columns"])
def test_degenerate_grams_give_finite_coefficients(kind: str) -> None:
    z = {
        "zero": torch.zeros(5, 6),
        "constant column": torch.ones(5, 6),
        "fewer rows than columns": normal(2, 6, seed=4),
    }
    gram = z[kind].double().mT @ z[kind].double()
    pivots, lengths = pivoted_cholesky(gram)
    assert sorted(pivots.tolist()) == list(range(6))
    assert bool(torch.isfinite(lengths).all())
    assert bool(torch.isfinite(interpolation(gram, pivots[:3])).all())
    order, errors = backward_elimination([(gram.reshape(6, 1, 6, 1), normal(2, 6, 1, seed=5))])
    assert sorted(order.tolist()) == list(range(6))
    assert bool(torch.isfinite(errors).all())


@given(st.integers(2, 9), st.integers(1, 8), st.sampled_from([1.0, 2.0]), st.integers(0, 60))
def test_strong_exchanges_bound_the_coefficients_and_the_error(columns: int, k: int, f: float, seed: int) -> None:
    k = min(k, columns - 1)
    z = normal(30, columns, seed=seed)
    start = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[:k]
    kept = strong_rrqr(z.mT @ z, start, largest=f)
    assert len(set(kept.tolist())) == k
    t = interpolation(z.mT @ z, kept)
    assert float(t.abs().max()) <= f * (1 + 1e-6)
    sigma = float(torch.linalg.svdvals(z)[k])
    bound = (1 + f**2 * k * (columns - k)) ** 0.5 * sigma
    assert float(torch.linalg.matrix_norm(z - z[:, kept] @ t, ord=2)) <= bound * (1 + 1e-6)


def test_strong_exchanges_repair_kahan_s_matrix() -> None:
    n, c = 24, 0.6
    s = (1 - c**2) ** 0.5
    upper = torch.eye(n, dtype=torch.float64) - c * torch.triu(torch.ones(n, n, dtype=torch.float64), 1)
    z = torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ upper
    greedy = interpolation(z.mT @ z, range(n - 1))
    strong = interpolation(z.mT @ z, strong_rrqr(z.mT @ z, range(n - 1), largest=1.5))
    assert float(greedy.abs().max()) > 100
    assert float(strong.abs().max()) <= 1.5 * (1 + 1e-4)


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match="a number of at least 1"):
        strong_rrqr(torch.eye(3), [0], largest=0.5)


def _refit_error(gram: Tensor, weight: Tensor, kept: list[int]) -> float:
    """`min_V E‖Wx − V x_J‖²` by the normal equations."""
    if not kept:
        return float((weight * (weight @ gram)).sum())
    inner, crossed = gram[kept][:, kept], (weight @ gram)[:, kept]
    fitted = torch.linalg.solve(inner, crossed.mT).mT
    return float((weight * (weight @ gram)).sum() - (fitted * crossed).sum())


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("share", [1e-9, 0.5])
def test_elimination_errors_are_those_of_a_refit(width: int, share: float) -> None:
    count, grams, weights = 7, [], []
    for seed in (6, 8):  # two consumers
        z = normal(90, count * width, seed=seed)
        grams.append(z.mT @ z / 90)
        weights.append(normal(4, count * width, seed=seed + 1))
    consumers = [
        (g.reshape(count, width, count, width), w.reshape(4, count, width)) for g, w in zip(grams, weights, strict=True)
    ]
    order, errors = backward_elimination(consumers, damping=1e-12, share=share)
    assert sorted(order.tolist()) == list(range(count))
    for m in range(count + 1):
        kept = [j * width + b for j in sorted(order[m:].tolist()) for b in range(width)]
        expected = sum(_refit_error(g, w, kept) for g, w in zip(grams, weights, strict=True))
        assert float(errors[m]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_one_at_a_time_takes_the_cheapest_each_time() -> None:
    z = normal(50, 6, seed=10)
    gram, weight = z.mT @ z / 50, normal(3, 6, seed=11)
    order, _ = backward_elimination([(gram.reshape(6, 1, 6, 1), weight[:, :, None])], damping=1e-12, share=1e-9)
    kept = list(range(6))
    for column in order.tolist():
        costs = {j: _refit_error(gram, weight, [i for i in kept if i != j]) for j in kept}
        assert column == min(costs, key=costs.__getitem__)
        kept.remove(column)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 50))
def test_errors_never_fall(count: int, width: int, seed: int) -> None:
    z = normal(5, count * width, seed=seed)
    gram = (z.mT @ z).reshape(count, width, count, width)
    _, errors = backward_elimination([(gram, normal(3, count, width, seed=seed + 1))])
    assert bool((errors.diff() >= 0).all())
    assert float(errors[0]) == 0

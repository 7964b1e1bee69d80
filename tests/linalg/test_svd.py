"""The three roads to a singular value decomposition, against SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from rankfold.errors import NumericsError
from rankfold.linalg import svd as roads
from rankfold.linalg.svd import exact_svd, gram_svd, randomized_svd, svd
from rankfold.testing.devices import generator_states, same_states
from rankfold.testing.matrices import HARD_WEIGHTS, hard_weight, normal

Road = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
ROADS: list[Road] = [svd, exact_svd, gram_svd]
MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1e3, 1e3, allow_subnormal=False))
)


def decayed(m: int, n: int, *, base: float, seed: int) -> Tensor:
    """A matrix with singular values 1, base, base², …"""
    k = min(m, n)
    u, _ = torch.linalg.qr(normal(m, k, seed=seed))
    v, _ = torch.linalg.qr(normal(n, k, seed=seed + 1))
    return (u * base ** torch.arange(k, dtype=torch.float64)) @ v.mT


@pytest.mark.parametrize("road", ROADS)
@given(array=MATRICES)
def test_singular_values_equal_scipy_s(road: Road, array: np.ndarray) -> None:
    expected = scipy.linalg.svdvals(array)
    _, s, _ = road(torch.from_numpy(array))
    np.testing.assert_allclose(s.numpy(), expected, rtol=0, atol=1e-13 * max(expected[0], 1e-300))


@pytest.mark.parametrize("road", ROADS)
@given(array=MATRICES, scale=st.sampled_from([1.0, 1e20, 1e-20, 1e150, 1e-150]))
def test_vectors_are_orthonormal_and_multiply_out(road: Road, array: np.ndarray, scale: float) -> None:
    matrix = torch.from_numpy(array) * scale
    u, s, vh = road(matrix)
    k = min(matrix.shape)
    assert (u.shape, s.shape, vh.shape) == ((matrix.shape[0], k), (k,), (k, matrix.shape[1]))
    torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((s >= 0).all())
    assert bool((s.diff() <= 0).all())
    size = float(matrix.abs().max())
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-13 * size if size else 0)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", HARD_WEIGHTS)
def test_hard_matrices_are_decomposed(road: Road, kind: str) -> None:
    matrix = hard_weight(kind, (6, 14))
    u, s, vh = road(matrix)
    assert u.dtype == torch.float64
    wide = matrix.double()
    assert float(((u * s) @ vh - wide).abs().max()) <= 1e-13 * max(float(wide.abs().max()), 1e-300)


def test_the_gram_road_keeps_small_singular_values() -> None:
    # The textbook road, eigenvalues of MMᵀ, loses everything below 1e-8 of the largest.
    matrix = decayed(6, 400, base=1e-2, seed=1)
    _, s, _ = gram_svd(matrix)
    np.testing.assert_allclose(s.numpy(), 1e-2 ** np.arange(6.0), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"), [((4, 64), "gram"), ((64, 4), "gram"), ((4, 63), "exact"), ((1, 64), "exact")]
)
def test_very_flat_matrices_go_through_the_gram(
    shape: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name, road in (("gram", gram_svd), ("exact", exact_svd)):
        monkeypatch.setattr(roads, f"{name}_svd", lambda m, name=name, road=road: (taken.append(name), road(m))[1])
    svd(normal(*shape, seed=2))
    assert taken[0] == expected


def test_where_divide_and_conquer_fails_qr_iteration_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("did not converge")

    matrix = normal(5, 8, seed=3) * 1e20
    expected = scipy.linalg.svdvals(matrix.numpy())
    monkeypatch.setattr(torch.linalg, "svd", fail)
    u, s, vh = exact_svd(matrix)
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e8)


@pytest.mark.parametrize("road", [*ROADS, lambda matrix: randomized_svd(matrix, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(road: Road, value: float) -> None:
    matrix = normal(3, 60, seed=4)
    matrix[1, 2] = value
    with pytest.raises(NumericsError, match="every element is finite"):
        road(matrix)


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_the_randomised_road_finds_the_leading_triplets(scale: float) -> None:
    matrix = decayed(80, 60, base=0.7, seed=5) * scale
    u, s, vh = randomized_svd(matrix, 5)
    expected_u, expected_s, expected_vh = exact_svd(matrix)
    np.testing.assert_allclose(s.numpy(), expected_s[:5].numpy(), rtol=1e-10)
    found, expected = (u * s) @ vh, (expected_u[:, :5] * expected_s[:5]) @ expected_vh[:5]
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_the_randomised_road_keeps_the_residual_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "svd", lambda matrix: pytest.fail("fell back"))
    matrix = decayed(80, 60, base=0.8, seed=6)
    for tolerance in (1e-2, 1e-6, 1e-10):
        u, s, vh = randomized_svd(matrix, 4, tolerance=tolerance, sweeps=40)
        assert float((matrix @ vh.mT - u * s).norm(dim=0).max()) <= tolerance * float(s[0])
        assert float((matrix.mT @ u - vh.mT * s).norm(dim=0).max()) <= 1e-10 * float(s[0])


def test_a_residual_that_stays_large_falls_back_to_the_exact_road(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(roads, "svd", lambda matrix: (taken.append(matrix), exact_svd(matrix))[1])
    matrix, _ = torch.linalg.qr(normal(60, 60, seed=7))  # all singular values equal: no subspace stands out
    matrix[:, 0] *= 1.001
    u, s, vh = randomized_svd(matrix, 3, tolerance=1e-14, sweeps=2)
    assert len(taken) == 1
    expected_u, expected_s, expected_vh = exact_svd(matrix)
    assert torch.equal(u, expected_u[:, :3])
    assert torch.equal(s, expected_s[:3])
    assert torch.equal(vh, expected_vh[:3])


def test_ranks_near_the_full_one_are_exact_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(12, 30, seed=8)
    monkeypatch.setattr(torch, "Generator", lambda: pytest.fail("drew a start"))
    torch.testing.assert_close(randomized_svd(matrix, 10)[1], exact_svd(matrix)[1][:10])


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = decayed(80, 60, base=0.7, seed=9)
    before = generator_states()
    first, again, other = (randomized_svd(matrix, 3, seed=seed) for seed in (1, 1, 2))
    assert same_states(before, generator_states())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_zero_matrix_has_zero_values_on_every_road() -> None:
    for u, s, vh in (svd(torch.zeros(40, 50)), gram_svd(torch.zeros(2, 50)), randomized_svd(torch.zeros(40, 50), 3)):
        assert float(s.abs().max()) == 0
        assert bool(torch.isfinite(u).all())
        assert bool(torch.isfinite(vh).all())

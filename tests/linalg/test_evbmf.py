"""Laws of variational Bayes of a matrix: planted ranks, scales, noise, and a slow reference of the global solution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from rankfold.linalg.evbmf import evbmf


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(rows: int, columns: int, rank: int, snr: float, seed: int) -> Tensor:
    """A matrix of a rank, all of whose singular values are alike, and noise of variance 1."""
    left, right = torch.linalg.qr(noise(rows, rank, seed))[0], torch.linalg.qr(noise(columns, rank, seed + 1))[0]
    low = left @ right.mT
    return low * math.sqrt(snr) / low.square().mean().sqrt() + noise(rows, columns, seed + 2)


def found(matrix: Tensor) -> int:
    return evbmf(torch.linalg.svdvals(matrix), *matrix.shape).rank


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "snr"),
    [(64, 576, 8, 1.0), (64, 576, 8, 0.3), (576, 64, 8, 0.3), (128, 1152, 20, 1.0), (64, 64, 5, 1.0), (30, 20, 1, 1.0)],
)
def test_a_planted_rank_is_found(rows: int, columns: int, rank: int, snr: float) -> None:
    assert [found(planted(rows, columns, rank, snr, 10 * seed)) for seed in range(6)] == [rank] * 6


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e25])
def test_the_rank_does_not_depend_on_the_scale(scale: float) -> None:
    matrix = planted(40, 200, 6, 0.5, 3)
    plain = evbmf(torch.linalg.svdvals(matrix), 40, 200)
    scaled = evbmf(torch.linalg.svdvals(matrix) * scale, 40, 200)
    assert scaled.rank == plain.rank == 6
    assert scaled.variance == pytest.approx(plain.variance * scale**2, rel=1e-6)
    assert torch.allclose(scaled.values, plain.values * scale, rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 576), (256, 256), (1, 9), (3, 3), (16, 144)])
def test_noise_has_no_rank(shape: tuple[int, int]) -> None:
    assert [found(noise(*shape, seed)) for seed in range(8)] == [0] * 8
    fresh = torch.nn.init.kaiming_normal_(torch.empty(64, 576), generator=torch.Generator().manual_seed(0))
    assert found(fresh) == 0


def test_the_variance_of_the_noise_is_found() -> None:
    for snr in (0.0, 0.3, 1.0):
        matrix = planted(128, 512, 10, snr, 5)
        assert evbmf(torch.linalg.svdvals(matrix), 128, 512).variance == pytest.approx(1.0, rel=0.03)


def test_values_are_shrunk_and_never_grown() -> None:
    matrix = planted(64, 576, 8, 1.0, 0)
    values = torch.linalg.svdvals(matrix)
    shrunk = evbmf(values, 64, 576).values
    assert bool((shrunk < values[:8]).all())
    assert bool((shrunk > 0.5 * values[:8]).all())


@pytest.mark.parametrize("values", [torch.zeros(4), torch.zeros(0), torch.zeros(1)])
def test_a_matrix_of_zeros_has_no_rank(values: Tensor) -> None:
    assert evbmf(values, 4, 9).rank == 0


def test_energy_outside_the_values_counts_as_noise() -> None:
    matrix = planted(64, 576, 8, 1.0, 0)
    values = torch.linalg.svdvals(matrix)
    rest = float(values[40:].square().sum())
    assert evbmf(values[:40], 64, 576, residual=rest).rank == 8


def reference(values: list[float], rows: int, columns: int) -> int:
    """The rank by the free energy of every component, minimised over a fine grid of variances: slow, and from scratch.

    With the noise variance fixed, a component of value γ is kept where its analytic solution has less free energy than
    without it. `κ = (γ²/σ² ...)`: Nakajima et al. 2013, equations 20 to 27, for empirical hyperparameters.
    """
    small, large = min(rows, columns), max(rows, columns)
    gamma = np.array(values, dtype=np.float64)
    gamma = np.concatenate([gamma, np.zeros(small - len(gamma))])

    def component(g: float, variance: float) -> tuple[float, bool]:
        """Free energy of a component over that of none, and whether it is kept."""
        if g * g <= (math.sqrt(small) + math.sqrt(large)) ** 2 * variance:
            return 0.0, False
        inner = g * g - (small + large) * variance
        product = 0.5 / (small * large) * (inner + math.sqrt(max(inner * inner - 4 * small * large * variance**2, 0.0)))
        kept = (
            large * math.log(g / (large * variance) * (shrunk := _shrunk(g, variance)) + 1)
            + small * math.log(g / (small * variance) * shrunk + 1)
            + (large * small / variance) * (-2 * shrunk * g / (large * small) + product)
        )
        return (kept, True) if kept <= 0 else (0.0, False)

    def _shrunk(g: float, variance: float) -> float:
        ratio = 1 - (small + large) * variance / g**2
        return g / 2 * (ratio + math.sqrt(max(ratio**2 - 4 * small * large * variance**2 / g**4, 0.0)))

    def energy(log_variance: float) -> float:
        variance = math.exp(log_variance)
        kept = sum(component(float(g), variance)[0] for g in gamma)
        return small * large * log_variance + float((gamma**2).sum()) / variance + kept

    high = math.log(float((gamma**2).sum()) / (small * large))
    grid = np.linspace(high - 12, high, 600)
    best = int(np.argmin([energy(each) for each in grid]))
    near = minimize_scalar(energy, bounds=(grid[max(best - 1, 0)], grid[min(best + 1, 599)]), method="bounded")
    variance = math.exp(min((float(near.x), float(grid[best])), key=energy))
    return sum(component(float(g), variance)[1] for g in gamma)


def test_it_agrees_with_a_slow_reference() -> None:
    draw = np.random.default_rng(0)
    differ = 0
    for seed in range(200):
        rows, columns = int(draw.integers(3, 30)), int(draw.integers(3, 60))
        rank = int(draw.integers(0, min(rows, columns) // 2 + 1))
        matrix = planted(rows, columns, rank, float(draw.uniform(0.2, 3)), seed) if rank else noise(rows, columns, seed)
        values = torch.linalg.svdvals(matrix)
        differ += evbmf(values, rows, columns).rank != reference(values.tolist(), rows, columns)
    assert differ == 0

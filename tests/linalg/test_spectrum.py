"""Errors of every rank at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold.linalg.spectrum import explained_tail, tail_energy, weighted_energy
from rankfold.testing.matrices import normal


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.sampled_from([1.0, 1e20, 1e-20, 1e160, 1e-160]))
def test_tail_energy_is_the_share_of_the_values_cut_off(values: list[float], scale: float) -> None:
    s = np.sort(np.array(values))[::-1]
    total = float(np.square(s).sum())
    found = tail_energy(torch.from_numpy(s.copy()) * scale)
    assert len(found) == len(s) + 1
    if total < 1e-280 or float((s * scale).max()) < 1e-290:
        assert bool(torch.isfinite(found).all())
        return
    expected = [float(np.square(s[rank:]).sum()) / total for rank in range(len(s) + 1)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-15)
    assert bool((found.diff() <= 0).all())


def test_a_zero_spectrum_has_no_error_at_any_rank() -> None:
    assert tail_energy(torch.zeros(3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("block", [1, 2, 3])
def test_explained_tail_is_what_a_projection_leaves(block: int) -> None:
    matrix = normal(5, 12, seed=1)
    q, _ = torch.linalg.qr(normal(12, 6, seed=2))
    found = explained_tail(matrix @ q, matrix.square().sum(), block=block)
    assert len(found) == 6 // block + 1
    for rank, error in enumerate(found.tolist()):
        kept = q[:, : rank * block]
        left = float((matrix - matrix @ kept @ kept.mT).square().sum() / matrix.square().sum())
        assert error == pytest.approx(left, abs=1e-12)


def test_nothing_to_explain_is_no_error() -> None:
    assert float(explained_tail(torch.zeros(2, 4), torch.tensor(0.0), block=2).abs().max()) == 0


def test_weighted_energy_is_the_mean_squared_output() -> None:
    weight, inputs = normal(4, 6, seed=3), normal(50, 6, seed=4)
    expected = np.mean([np.square(weight.numpy() @ row).sum() for row in inputs.numpy()])
    assert float(weighted_energy(weight, inputs.mT @ inputs / 50)) == pytest.approx(expected)
    assert weighted_energy(weight.half(), torch.eye(6)).dtype == torch.float64


def test_rounding_never_makes_an_energy_negative() -> None:
    weight = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    almost = torch.tensor([[1.0, 1.0 + 1e-16], [1.0 + 1e-16, 1.0 - 1e-15]], dtype=torch.float64)
    assert float(weighted_energy(weight, almost)) >= 0

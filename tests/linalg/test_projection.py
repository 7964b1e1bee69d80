"""Two-stage maps: the nested basis, the errors of every rank, and the refit, against NumPy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference.whitened import refitted
from torch import Tensor

from rankfold.linalg.projection import balanced, split_basis, split_errors, split_refit
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.whitening import left_spectrum
from rankfold.testing.matrices import normal

CASES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))


def drawn(out: int, a: int, b: int, seed: int, *, positions: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, patches that are correlated along both axes, and their second moment."""
    weight = normal(out, a, b, seed=seed)
    mix = normal(a * b, a * b, seed=seed + 1) + 2 * torch.eye(a * b, dtype=torch.float64)
    patches = (normal(positions, a * b, seed=seed + 2) @ mix).reshape(positions, a, b)
    flat = patches.flatten(1)
    return weight, patches, (flat.mT @ flat / positions).reshape(a, b, a, b)


def product(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("orb,ra->oab", left, right)


def energy(difference: Tensor, gram: Tensor) -> float:
    return float(torch.einsum("oab,abcd,ocd->", difference, gram, difference))


@given(CASES)
def test_the_refit_is_the_least_squares_solution(case: tuple[int, int, int, int]) -> None:
    weight, patches, gram = drawn(*case)
    basis = split_basis(weight, gram, damping=0.0)
    for rank in range(1, len(basis) + 1):
        left, right = split_refit(weight, gram, basis[:rank], damping=0.0)
        best = refitted(weight.numpy(), patches.numpy(), basis[:rank].numpy())
        expected = np.einsum("orb,ra->oab", best, basis[:rank].numpy())
        np.testing.assert_allclose(
            product(left, right).numpy(), expected, rtol=0, atol=1e-6 * float(weight.abs().max())
        )


@given(CASES, st.sampled_from([0.0, 1e-6, 1e-2]))
def test_errors_equal_the_measured_ones_and_never_grow(case: tuple[int, int, int, int], damping: float) -> None:
    weight, _, gram = drawn(*case)
    _, a, b = weight.shape
    eye = torch.eye(a * b, dtype=torch.float64).reshape(a, b, a, b)
    metric = gram + damping * torch.einsum("abab->", gram) / (a * b) * eye
    basis = split_basis(weight, gram, damping=damping)
    errors = split_errors(weight, gram, basis, damping=damping)
    assert errors.shape == (len(basis) + 1,)
    assert float(errors[0]) == 1
    assert bool((errors.diff() <= 0).all())
    for rank in range(1, len(basis) + 1):
        left, right = split_refit(weight, gram, basis[:rank], damping=damping)
        measured = energy(weight - product(left, right), metric) / energy(weight, metric)
        assert float(errors[rank]) == pytest.approx(measured, abs=1e-8)
    assert float(errors[-1]) == pytest.approx(0, abs=1e-8)


@given(CASES)
def test_the_basis_is_orthonormal_in_the_marginal_metric(case: tuple[int, int, int, int]) -> None:
    weight, _, gram = drawn(*case)
    marginal = torch.einsum("abcb->ac", gram) / gram.shape[1]
    basis = split_basis(weight, gram, damping=0.0)
    assert len(basis) == min(weight.shape[1], weight.shape[0] * weight.shape[2])
    found = basis @ marginal @ basis.mT
    torch.testing.assert_close(found, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_with_nothing_left_for_the_second_stage_it_is_whitened_svd(out: int, a: int, seed: int) -> None:
    weight, _, gram = drawn(out, a, 1, seed)
    errors = split_errors(weight, gram, split_basis(weight, gram, damping=1e-6), damping=1e-6)
    _, s = left_spectrum(weight[:, :, 0], gram.reshape(a, a), damping=1e-6)
    np.testing.assert_allclose(errors.numpy(), tail_energy(s).numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_positions_that_depend_on_each_other_explain_nothing_twice(damping: float) -> None:
    # All columns of every patch are equal, so the features of a rank are b times the same; an orthogonalisation that
    # fills in arbitrary directions would call them explained.
    weight = normal(6, 4, 9, seed=1)
    column = normal(500, 4, seed=2)
    gram = torch.einsum("pa,pc->ac", column, column)[:, None, :, None].expand(4, 9, 4, 9) / 500
    basis = split_basis(weight, gram, damping=damping)
    errors = split_errors(weight, gram, basis, damping=damping)
    for rank in range(1, 5):
        left, right = split_refit(weight, gram, basis[:rank], damping=damping)
        measured = energy(weight - product(left, right), gram) / energy(weight, gram)
        assert float(errors[rank]) == pytest.approx(measured, abs=1e-5 if damping else 1e-9)


@pytest.mark.parametrize("scale", [1e20, 1e-20], ids=str)
def test_both_stages_have_the_scale_of_the_weight(scale: float) -> None:
    weight, _, gram = drawn(5, 4, 3, 7)
    left, right = split_refit(
        weight * scale, gram * scale**2, split_basis(weight * scale, gram * scale**2, damping=1e-6)[:2], damping=1e-6
    )
    for stage in (left, right):
        assert 1e-3 < float(stage.abs().max()) / scale**0.5 < 1e3


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(-60, 60), st.integers(0, 99))
def test_balancing_keeps_the_product_to_the_bit(out: int, rank: int, b: int, power: int, seed: int) -> None:
    left, right = normal(out, rank, b, seed=seed) * 2.0**power, normal(rank, 4, seed=seed + 1)
    new_left, new_right = balanced(left, right)
    assert torch.equal(
        new_left[:, :, None, :] * new_right[None, :, :, None], left[:, :, None, :] * right[None, :, :, None]
    )
    ratio = new_left.norm(dim=(0, 2)) / new_right.norm(dim=1)
    assert bool(((ratio >= 0.5 - 1e-12) & (ratio <= 2 + 1e-12)).all())


def test_channels_that_are_zero_on_one_side_get_a_norm_of_about_one_on_the_other() -> None:
    left, right = normal(3, 3, 2, seed=1) * 1e30, normal(3, 4, seed=2) * 1e-30
    left[:, 0], right[1] = 0, 0
    left[:, 2], right[2] = 0, 0
    new_left, new_right = balanced(left, right)
    assert 0.7 < float(new_right[0].norm()) < 1.5
    assert 0.7 < float(new_left[:, 1].norm()) < 1.5
    assert float(new_left[:, 2].norm()) == float(new_right[2].norm()) == 0

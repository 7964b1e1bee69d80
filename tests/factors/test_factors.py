"""Factors multiply out to what their stages do one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rankfold.errors import OptionError
from rankfold.factors import Factors, MatrixFactors, MirroredFactors, SpatialFactors, TuckerFactors
from rankfold.testing.matrices import normal

FACTORS: list[Factors] = [
    MatrixFactors(normal(7, 4, 1, 1, seed=1), normal(4, 5, 3, 2, seed=2)),
    MirroredFactors(normal(7, 4, 3, 2, seed=3), normal(4, 5, 1, 1, seed=4)),
    SpatialFactors(normal(7, 4, 1, 2, seed=5), normal(4, 5, 3, 1, seed=6)),
    TuckerFactors(normal(7, 3, 1, 1, seed=7), normal(3, 4, 3, 2, seed=8), normal(4, 5, 1, 1, seed=9)),
]


@pytest.mark.parametrize("factors", FACTORS, ids=lambda factors: factors.form)
def test_the_product_does_what_the_stages_do_in_turn(factors: Factors) -> None:
    image = normal(2, 5, 6, 7, seed=10)
    staged = image
    for stage in factors.stages():
        staged = F.conv2d(staged, stage)
    assert factors.reconstruct().shape == (7, 5, 3, 2)
    torch.testing.assert_close(staged, F.conv2d(image, factors.reconstruct()))


@pytest.mark.parametrize("factors", FACTORS, ids=lambda factors: factors.form)
def test_mixing_the_outputs_multiplies_the_product(factors: Factors) -> None:
    matrix = normal(7, 7, seed=11)
    expected = torch.einsum("po,oikl->pikl", matrix, factors.reconstruct())
    mixed = factors.mixed(matrix)
    torch.testing.assert_close(mixed.reconstruct(), expected)
    assert (type(mixed), mixed.ranks) == (type(factors), factors.ranks)


@pytest.mark.parametrize("factors", FACTORS, ids=lambda factors: factors.form)
def test_parameters_are_those_of_the_stages(factors: Factors) -> None:
    assert factors.n_params == sum(stage.numel() for stage in factors.stages())


def test_ranks_are_the_widths_between_the_stages() -> None:
    assert [factors.ranks for factors in FACTORS] == [4, 4, 4, (4, 3)]


def test_a_linear_layer_has_no_kernel() -> None:
    factors = MatrixFactors(normal(7, 4, seed=12), normal(4, 5, seed=13))
    torch.testing.assert_close(factors.reconstruct(), factors.left @ factors.right)


@pytest.mark.parametrize(
    ("left", "right"),
    [((7, 4), (3, 5)), ((7, 4, 1), (4, 5)), ((7,), (7,)), ((7, 4, 3), (4, 5, 3)), ((7, 4, 2, 1), (4, 5, 3, 1))],
)
def test_stages_that_do_not_fit_together_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="left is out × r"):
        MatrixFactors(torch.zeros(left), torch.zeros(right))

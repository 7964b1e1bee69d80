"""Every law of the conformance suite fails for a method that breaks it: a suite that passes anything proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rankfold.decompositions import SVD, Decomposition, Moments, WhitenedSVD
from rankfold.errors import DataError
from rankfold.factors import Factors, MatrixFactors, Rank
from rankfold.testing import DecompositionConformance

SHAPES = ((6, 8), (4, 3, 2, 2))
LAYERS = ("linear", "conv2d grouped")


@dataclass(frozen=True)
class Broken(Decomposition):
    """Plain SVD, but for what a test replaces. Not registered: names in the registry are for good."""

    option: float = 0.25

    @property
    def form(self) -> str:
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        return SVD().ranks(shape)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        return SVD().decompose(weight, rank, moments)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        return SVD().errors(weight, moments)

    def __str__(self) -> str:
        return "broken"


def suite(method: Decomposition, **attributes: Any) -> DecompositionConformance:
    """The cases for a method, ready to be called one by one."""
    kind = type(
        "Suite", (DecompositionConformance,), {"shapes": SHAPES, "layers": LAYERS, **attributes, "method": method}
    )
    return kind()


def breaking(**members: Any) -> Decomposition:
    """An instance of a subclass of `Broken` with some of its members replaced."""
    kind: Any = dataclass(frozen=True)(type("Changed", (Broken,), {"__str__": Broken.__str__, **members}))
    return kind()


def decompose_as(change: Callable[[MatrixFactors, Tensor], MatrixFactors]) -> Decomposition:
    """Plain SVD whose factors are changed, given the weight."""

    def decompose(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors:
        factors = SVD().decompose(weight, rank, moments)
        assert isinstance(factors, MatrixFactors)
        return change(factors, weight)

    return breaking(decompose=decompose)


@dataclass(frozen=True)
class Counter:
    """Numbers that differ at every call."""

    calls: ClassVar[list[int]] = []

    @classmethod
    def next(cls) -> float:
        cls.calls.append(0)
        return float(len(cls.calls))


def test_the_unbroken_method_passes() -> None:
    cases = suite(Broken())
    cases.test_full_rank_reconstructs("cpu")
    cases.test_errors_equal_the_measured_ones("toy", False, "cpu")
    cases.test_error_never_grows_with_rank("cpu")
    cases.test_no_storage_is_shared("cpu")
    cases.test_same_input_gives_same_bits("cpu")
    cases.test_dtype_and_device_are_kept("cpu")
    cases.test_factors_have_the_form_and_rank_asked_for("cpu")
    cases.test_finite_on_hard_inputs("zero", "cpu")
    cases.test_full_rank_gives_the_layer_back("cpu")
    cases.test_shell_equals_the_dense_layer_of_the_product(True, "cpu")


def test_an_inexact_full_rank_is_caught() -> None:
    method = decompose_as(lambda f, w: replace(f, left=f.left * 1.001))
    with pytest.raises(AssertionError):
        suite(method).test_full_rank_reconstructs("cpu")
    with pytest.raises(AssertionError):
        suite(method).test_full_rank_gives_the_layer_back("cpu")


def test_errors_that_flatter_are_caught() -> None:
    method = breaking(errors=lambda self, weight, moments: 0.9 * SVD().errors(weight, moments))
    with pytest.raises(AssertionError):
        suite(method).test_errors_equal_the_measured_ones("toy", False, "cpu")


def test_errors_in_another_metric_are_caught() -> None:
    def decompose(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        return WhitenedSVD().decompose(weight, rank, moments)

    method = breaking(needs=("input-gram", "input-mean"), decompose=decompose)
    with pytest.raises(AssertionError):
        suite(method).test_errors_equal_the_measured_ones("toy", True, "cpu")


def test_an_error_that_grows_is_caught() -> None:
    flipped = breaking(errors=lambda self, weight, moments: SVD().errors(weight, moments).flip(0))
    with pytest.raises(AssertionError):
        suite(flipped).test_error_never_grows_with_rank("cpu")

    def from_the_wrong_end(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        whole = SVD().decompose(weight, len(SVD().ranks(weight.shape)), moments)
        assert isinstance(whole, MatrixFactors)
        other = -1 if rank == 2 else 1  # rank 2 subtracts what rank 1 had right
        return MatrixFactors(other * whole.left[:, :rank].clone(), whole.right[:rank].clone())

    with pytest.raises(AssertionError):
        suite(breaking(decompose=from_the_wrong_end)).test_error_never_grows_with_rank("cpu")


def test_another_rank_than_asked_for_is_caught() -> None:
    method = decompose_as(lambda f, w: MatrixFactors(f.left[:, :1].clone(), f.right[:1].clone()))
    with pytest.raises(AssertionError):
        suite(method).test_factors_have_the_form_and_rank_asked_for("cpu")


def test_another_dtype_is_caught() -> None:
    method = decompose_as(lambda f, w: MatrixFactors(f.left.double(), f.right.double()))
    with pytest.raises(AssertionError):
        suite(method).test_dtype_and_device_are_kept("cpu")


def test_storage_shared_with_the_weight_is_caught() -> None:
    def decompose(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        flat = weight.flatten(1)
        eye = torch.eye(len(flat), dtype=flat.dtype).reshape(len(flat), len(flat), *[1] * (weight.ndim - 2))
        return MatrixFactors(eye, weight) if rank == len(flat) else SVD().decompose(weight, rank, moments)

    with pytest.raises(AssertionError):
        suite(breaking(decompose=decompose)).test_no_storage_is_shared("cpu")


def test_views_of_something_larger_are_caught() -> None:
    method = decompose_as(lambda f, w: replace(f, left=torch.cat([f.left, f.left])[: len(f.left)]))
    with pytest.raises(AssertionError):
        suite(method).test_no_storage_is_shared("cpu")


def test_a_weight_that_is_changed_is_caught() -> None:
    def decompose(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        factors = SVD().decompose(weight, rank, moments)
        weight.zero_()
        return factors

    with pytest.raises(AssertionError):
        suite(breaking(decompose=decompose)).test_no_storage_is_shared("cpu")


def test_chance_is_caught() -> None:
    method = decompose_as(lambda f, w: replace(f, left=f.left * (1 + 1e-12 * Counter.next())))
    with pytest.raises(AssertionError):
        suite(method).test_same_input_gives_same_bits("cpu")


def test_a_touched_global_generator_is_caught() -> None:
    method = decompose_as(lambda f, w: (torch.rand(1), f)[1])
    with pytest.raises(AssertionError):
        suite(method).test_same_input_gives_same_bits("cpu")
    with pytest.raises(AssertionError):
        suite(method).test_same_bits_and_no_global_generator("cpu")


@pytest.mark.parametrize("kind", ["zero", "1e20", "half"])
def test_what_is_not_finite_is_caught(kind: str) -> None:
    def normalised(factors: MatrixFactors, weight: Tensor) -> MatrixFactors:
        size = weight.float().square().sum().to(weight.dtype)  # 0, overflows in float32, or in half
        return MatrixFactors(factors.left / size, factors.right * size * (1e5 if kind == "half" else 1))

    with pytest.raises(AssertionError):
        suite(decompose_as(normalised)).test_finite_on_hard_inputs(kind, "cpu")


def test_an_unchecked_rank_is_caught() -> None:
    def decompose(self: Broken, weight: Tensor, rank: Any, moments: Moments) -> Factors:
        return SVD().decompose(weight, 1, moments)

    with pytest.raises(pytest.fail.Exception):
        suite(breaking(decompose=decompose)).test_a_rank_that_is_no_candidate_is_refused(10**6, "cpu")


def test_unstated_needs_are_caught() -> None:
    def decompose(self: Broken, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
        return WhitenedSVD().decompose(weight, rank, moments)

    with pytest.raises(DataError, match="input moments"):
        suite(breaking(decompose=decompose)).test_missing_moments_are_named("cpu")


def test_needs_that_are_not_read_are_caught() -> None:
    with pytest.raises(pytest.fail.Exception):
        suite(breaking(needs=("input-gram",))).test_missing_moments_are_named("cpu")


def test_an_idle_option_is_caught() -> None:
    with pytest.raises(AssertionError):
        suite(Broken()).test_every_option_changes_something("option")


def test_a_method_that_refuses_everything_is_caught() -> None:
    method = breaking(refuses=lambda self, shape: "no case")
    with pytest.raises(AssertionError):
        suite(method).test_it_has_a_case_among_the_shapes()
    with pytest.raises(AssertionError):
        suite(method).test_it_has_a_case_among_the_layers()
    with pytest.raises(AssertionError):
        suite(breaking(refuses=lambda self, shape: "")).test_it_has_a_case_among_the_shapes()


def test_an_unknown_form_is_caught() -> None:
    with pytest.raises(AssertionError):
        suite(breaking(form="unheard-of")).test_its_form_is_known_to_the_shells()


def test_ranks_out_of_order_are_caught() -> None:
    method = breaking(ranks=lambda self, shape: SVD().ranks(shape)[::-1])
    with pytest.raises(AssertionError):
        suite(method).test_ranks_ascend_without_repetition()


def test_a_method_that_is_not_frozen_is_caught() -> None:
    @dataclass
    class Thawed(Decomposition):
        option: float = 0.25
        form = "matrix"
        ranks = Broken.ranks
        decompose = Broken.decompose

    with pytest.raises(pytest.fail.Exception):
        suite(Thawed()).test_it_is_frozen()

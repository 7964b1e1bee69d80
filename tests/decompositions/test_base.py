"""What a method inherits: errors by decomposing at every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from rankfold.decompositions import SVD, Decomposition, Moments, WhitenedSVD
from rankfold.errors import OptionError
from rankfold.factors import MatrixFactors, Rank
from rankfold.testing.matrices import moments_of_weight, toy_weight


@dataclass(frozen=True)
class FirstInputs(Decomposition):
    """Keeps the first r inputs: no good method, but a right one."""

    needs: ClassVar[tuple[str, ...]] = ("input-gram",)

    @property
    def form(self) -> str:
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        return list(range(1, shape[1] + 1))

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> MatrixFactors:
        moments.metric(self)
        return MatrixFactors(weight[:, :rank].clone(), torch.eye(weight.shape[1]).to(weight)[:rank])


def test_errors_are_measured_in_the_moments_a_method_reads() -> None:
    weight = toy_weight((4, 6))
    moments = moments_of_weight(weight)
    inputs = np.linalg.cholesky(moments.gram.numpy()).T  # six inputs with this very Gram
    total = np.square(inputs @ weight.numpy().T).sum()
    lost = [np.square(inputs[:, rank:] @ weight.numpy()[:, rank:].T).sum() / total for rank in range(1, 7)]
    expected = np.minimum.accumulate(np.clip(lost, 0, 1))  # a curve is never above 1 and never grows
    np.testing.assert_allclose(FirstInputs().errors(weight, moments).numpy(), expected, rtol=0, atol=1e-12)


def test_inherited_errors_equal_the_closed_form() -> None:
    weight = toy_weight((4, 3, 2))
    moments = moments_of_weight(weight)
    for method in (SVD(), SVD(mirrored=True), WhitenedSVD(damping=0.0)):
        found = Decomposition.errors(method, weight, moments)
        torch.testing.assert_close(found, method.errors(weight, moments), rtol=0, atol=1e-12)


def test_a_zero_weight_has_no_error() -> None:
    zero = torch.zeros(4, 6, dtype=torch.float64)
    assert Decomposition.errors(SVD(), zero, Moments()).tolist() == [0] * 4


def test_half_precision_is_widened_for_the_errors() -> None:
    weight = toy_weight((4, 6))
    half = Decomposition.errors(SVD(), weight.half(), Moments())
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, SVD().errors(weight.half(), Moments()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 5, True, (2,), 2.0, None])
def test_only_candidates_are_admitted(rank: Any) -> None:
    assert not SVD().admits((4, 6), rank)
    assert SVD().admits((4, 6), 2)
    with pytest.raises(OptionError):
        SVD().decompose(toy_weight((4, 6)), rank, Moments())

"""Tucker-2 against TensorLy and its own closed forms."""

from __future__ import annotations

import pytest
import torch

from rankfold.linalg.tucker import _conjugate_gradients, hooi, metric_tucker, metric_tucker_errors, refined_tucker


def _weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(seed)).double()


def _gram(features: int, seed: int = 1) -> torch.Tensor:
    root = torch.randn(features, features, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


def test_hooi_is_as_good_as_tensorly() -> None:
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    weight = _weight()
    (core, factors), _ = partial_tucker(weight.numpy(), rank=[4, 3], modes=[0, 1], n_iter_max=50, tol=1e-10)
    theirs = torch.from_numpy(tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    out, middle, inp = hooi(weight, (3, 4), sweeps=50, tolerance=1e-12)
    mine = torch.einsum("ob,bak,ai->oik", out, middle, inp)
    assert float((weight - mine).norm()) <= float((weight - theirs).norm()) * (1 + 1e-4)


def test_hooi_recovers_a_tensor_of_low_tucker_rank() -> None:
    out, core, inp = hooi(_weight(), (2, 3))
    low = torch.einsum("ob,bak,ai->oik", out, core, inp)
    again = hooi(low, (2, 3))
    torch.testing.assert_close(torch.einsum("ob,bak,ai->oik", *again), low)


def test_full_ranks_reconstruct_in_both_forms() -> None:
    weight = _weight()
    gram = _gram(54).reshape(6, 9, 6, 9)
    for out, core, inp in (hooi(weight, (6, 7)), metric_tucker(weight, gram, (6, 7), damping=1e-10)):
        torch.testing.assert_close(torch.einsum("ob,bak,ai->oik", out, core, inp), weight, rtol=1e-6, atol=1e-6)


def test_the_errors_of_all_ranks_are_those_of_the_factors() -> None:
    weight, gram = _weight(), _gram(54)
    errors = metric_tucker_errors(weight, gram.reshape(6, 9, 6, 9), [1, 3, 6], damping=1e-12)
    total = torch.trace(weight.flatten(1) @ gram @ weight.flatten(1).T)
    for i, inner in enumerate((1, 3, 6)):
        for outer in (1, 4, 7):
            factors = metric_tucker(weight, gram.reshape(6, 9, 6, 9), (inner, outer), damping=1e-12)
            lost = (weight - torch.einsum("ob,bak,ai->oik", *factors)).flatten(1)
            measured = torch.trace(lost @ gram @ lost.T) / total
            torch.testing.assert_close(errors[i, outer - 1], measured, rtol=1e-5, atol=1e-9)


def test_errors_never_grow_with_either_rank() -> None:
    errors = metric_tucker_errors(_weight(), _gram(54).reshape(6, 9, 6, 9), [1, 2, 3, 4, 5, 6], damping=1e-6)
    assert bool((errors.diff(dim=0) <= 1e-12).all())
    assert bool((errors.diff(dim=1) <= 1e-12).all())


def test_zero_weights_and_zero_inputs_stay_finite() -> None:
    for weight, gram in ((torch.zeros(7, 6, 9).double(), _gram(54)), (_weight(), torch.zeros(54, 54).double())):
        for part in metric_tucker(weight, gram.reshape(6, 9, 6, 9), (2, 2), damping=1e-6):
            assert bool(torch.isfinite(part).all())


def _lost(parts: tuple[torch.Tensor, ...], weight: torch.Tensor, gram: torch.Tensor) -> float:
    change = (weight - torch.einsum("ob,bak,ai->oik", *parts)).flatten(1)
    return float((change @ gram * change).sum())


@pytest.mark.parametrize("ranks", [(2, 3), (4, 4), (5, 6)])
def test_refining_lowers_the_error_in_the_metric(ranks: tuple[int, int]) -> None:
    weight, gram = _weight(), _gram(54)
    metric = gram.reshape(6, 9, 6, 9)
    start = metric_tucker(weight, metric, ranks, damping=1e-10)
    errors = [_lost(start, weight, gram)]
    for passes in (1, 2, 10):
        parts = refined_tucker(weight, metric, start, damping=1e-10, passes=passes)
        assert [part.shape for part in parts] == [part.shape for part in start]
        errors.append(_lost(parts, weight, gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.995 * errors[0]


def test_the_input_factor_ends_at_the_least_squares_solution() -> None:
    """Many steps of conjugate gradients reach the solution of all of its equations at once."""
    weight, gram = _weight(), _gram(54)
    out, core, inp = metric_tucker(weight, gram.reshape(6, 9, 6, 9), (3, 4), damping=1e-10)
    design = torch.einsum("bak,ij->bikaj", core, torch.eye(6).double()).reshape(4, 54, 18)
    root = torch.linalg.cholesky(gram).mT
    seen = torch.einsum("nm,bmv->bnv", root, design).flatten(0, 1)
    target = torch.einsum("nm,bm->bn", root, (out.mT @ weight.flatten(1))).flatten()
    expected = torch.linalg.lstsq(seen, target[:, None]).solution.reshape(3, 6)
    found = _conjugate_gradients(out.mT @ weight.flatten(1), core, inp, gram, 60)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_tucker_that_is_exact_is_not_refined() -> None:
    weight, gram = _weight(), _gram(54).reshape(6, 9, 6, 9)
    parts = metric_tucker(weight, gram, (6, 7), damping=1e-10)
    assert refined_tucker(weight, gram, parts, damping=1e-10, passes=3) is parts

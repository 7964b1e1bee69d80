"""CP, tensor train and Tucker: against TensorLy, on planted tensors, and on bad input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.decompositions import Decomposition, Moments
from rankfold.errors import BudgetError, NumericsError, OptionError
from rankfold.factors import Rank
from rankfold.linalg.cp import CANCELLING, alternate, drawn_components, slice_components
from rankfold.linalg.modes import PatchMetric, marginal, mode_roots, times, unfolded
from rankfold.linalg.train import carriages, joined
from rankfold.linalg.tucker import tucker
from rankfold.testing.matrices import moments_of_weight, normal

TENSORS = 50


def tensor(seed: int) -> Tensor:
    """A drawn tensor of three modes, whose unfoldings have falling singular values for every second seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = [int(size) for size in torch.randint(4, 15, (3,), generator=generator)]
    drawn = normal(*shape, seed=seed)
    for mode, size in enumerate(shape if seed % 2 else []):
        turned = torch.linalg.qr(normal(size, size, seed=seed + mode))[0]
        drawn = times(drawn, turned * 0.7 ** torch.arange(size), mode)
    return drawn


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


def test_modes_are_those_of_the_definition() -> None:
    drawn, matrix = normal(3, 4, 5, seed=0), normal(6, 4, seed=1)
    assert torch.allclose(times(drawn, matrix, 1), torch.einsum("rb,abc->arc", matrix, drawn))
    assert torch.equal(unfolded(drawn, 1), drawn.permute(1, 0, 2).reshape(4, 15))
    rows = normal(50, 4 * 3 * 2, seed=2)
    gram = rows.mT @ rows / 50
    patches = rows.reshape(50, 4, 3, 2)
    for mode in range(3):
        alone = patches.movedim(mode + 1, -1).reshape(-1, patches.shape[mode + 1])
        assert torch.allclose(marginal(gram, [4, 3, 2], mode), alone.mT @ alone / len(alone))
    for root, inverse in mode_roots(gram, [4, 3, 2], damping=0.0):
        assert torch.allclose(root @ inverse, torch.eye(len(root)).double(), atol=1e-8)


def test_the_last_stage_is_the_least_squares_solution() -> None:
    weight, rows, inputs = normal(5, 12, seed=0), normal(4, 12, seed=1), normal(80, 12, seed=2)
    gram = inputs.mT @ inputs / 80
    metric = PatchMetric(gram, weight, damping=0.0)
    found = metric.refit(rows)
    expected = torch.linalg.lstsq(inputs @ rows.mT, inputs @ weight.mT).solution.mT
    assert torch.allclose(found, expected, atol=1e-8)
    lost = (inputs @ (weight - found @ rows).mT).square().sum() / (inputs @ weight.mT).square().sum()
    assert metric.error(found @ rows) == pytest.approx(float(lost), rel=1e-6)
    left = 1 - metric.projected(rows).square().sum() / metric.total
    assert float(left) == pytest.approx(float(lost), rel=1e-6)
    doubled = torch.cat([rows, rows[:1]])  # a row that depends on others changes nothing
    assert metric.error(metric.refit(doubled) @ doubled) == pytest.approx(float(lost), rel=1e-6)


@pytest.mark.parametrize("seed", range(TENSORS))
def test_errors_are_not_above_those_of_tensorly(seed: int) -> None:
    """Tucker, CP and tensor train of one drawn tensor, at ranks of half of its sides."""
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac, tensor_train
    from tensorly.decomposition import tucker as other_tucker

    drawn = tensor(seed)
    ranks = [max(2, size // 2) for size in drawn.shape]
    with warnings.catch_warnings(), tensorly.backend_context("pytorch"):
        warnings.simplefilter("ignore")
        theirs = tensorly.tucker_to_tensor(other_tucker(drawn, ranks, n_iter_max=50))
        by_cp = tensorly.cp_to_tensor(parafac(drawn, max(ranks), n_iter_max=100, init="svd", random_state=seed))
        by_train = tensorly.tt_to_tensor(tensor_train(drawn, [1, ranks[0], ranks[2], 1]))
    core, bases = tucker(drawn, ranks)
    mine = core
    for mode, basis in enumerate(bases):
        mine = times(mine, basis, mode)
    assert error(mine, drawn) <= error(theirs, drawn) * (1 + 1e-3) + 1e-12
    starts = [slice_components(drawn, max(ranks)), *(drawn_components(drawn, max(ranks), i) for i in range(8))]
    best = min(alternate(drawn, start, sweeps=200, tolerance=1e-7)[1] for start in starts)
    assert best <= error(by_cp, drawn) * (1 + 1e-3) + 1e-12
    parts = carriages(drawn, [ranks[0], ranks[2]])
    rows = joined(parts)
    left = torch.tensordot(rows, drawn, ([1, 2], [0, 1]))
    train = torch.einsum("zij,zo->ijo", rows, left)
    assert error(train, drawn) <= error(by_train, drawn) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_start_of_cp_is_exact_at_its_last_rank_and_never_worse_at_a_larger_one(seed: int) -> None:
    drawn = tensor(seed).contiguous()
    most = drawn.shape[2] * min(drawn.shape[:2])
    errors = [error(slice_components(drawn, rank).tensor(), drawn) for rank in (1, 3, 9, most // 2, most)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-20


def test_components_that_cancel_are_stopped() -> None:
    """A tensor of rank 3 on the border of rank 2 has no best approximation by two terms: they diverge and cancel."""
    a, b = torch.eye(2, dtype=torch.float64)
    hard = sum(torch.einsum("i,j,k->ijk", *each) for each in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(hard, Tensor)
    found, left = alternate(hard, drawn_components(hard, 2, 0), sweeps=2000, tolerance=0.0)
    energy = float(found.factors[0].square().sum() / hard.square().sum())
    assert energy <= CANCELLING
    assert left < 0.1
    assert bool(torch.isfinite(found.tensor()).all())


PLANTED: list[tuple[Decomposition, tuple[int, ...], Rank]] = [
    (rf.CP(whitened=False, sweeps=200, tolerance=1e-9), (12, 10, 3, 3), 6),
    (rf.CP(sweeps=500, tolerance=1e-9), (12, 10, 3, 3), 6),
    (rf.TensorTrain(whitened=False), (12, 10, 5, 5), (3, 4, 5)),
    (rf.TensorTrain(), (12, 10, 5, 5), (3, 4, 5)),
    (rf.TensorTrain(separable=False, tied=True), (12, 10, 3, 3), (4, 4)),
    (rf.Tucker(whitened=False), (12, 10, 5, 5), (4, 5, 2, 2)),
    (rf.Tucker(), (12, 10, 5, 5), (4, 5, 2, 2)),
    (rf.Tucker(), (6, 5, 3, 3, 3), (3, 4, 2, 2, 2)),
]


@pytest.mark.parametrize(("method", "shape", "rank"), PLANTED, ids=lambda value: str(value))
def test_planted_ranks_are_found(method: Decomposition, shape: tuple[int, ...], rank: Rank) -> None:
    """A weight that is of the form at a rank is reconstructed at it, and not at half of it."""
    drawn = normal(*shape, seed=3)
    exact = method.decompose(drawn, rank, moments_of_weight(drawn)).reconstruct()
    if isinstance(rank, int):  # what CP makes of noise has components that are nearly alike: few sweeps find them again
        sides = [normal(size, rank, seed=seed) for seed, size in enumerate((shape[0], shape[1], 9))]
        exact = torch.einsum("or,ir,kr->oik", *sides).reshape(shape)
    moments = moments_of_weight(exact)
    assert error(method.decompose(exact, rank, moments).reconstruct(), exact) < 1e-6
    half = rank // 2 if isinstance(rank, int) else (rank[0] - 1, *rank[1:])
    assert error(method.decompose(exact, half, moments).reconstruct(), exact) > 1e-3


def test_random_starts_of_cp_are_tried() -> None:
    weight = normal(8, 7, 3, 3, seed=4)
    plain, more = (rf.CP(whitened=False, restarts=n).errors(weight, Moments())[0] for n in (0, 4))
    assert float(more) <= float(plain)


METHODS = [rf.CP(), rf.TensorTrain(), rf.Tucker()]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_kernel_of_one_is_refused(method: Decomposition) -> None:
    for shape in ((8, 8, 1, 1), (8, 8), (1, 8, 3, 3)):
        assert "kernel larger than 1" in (method.refuses(shape) or "")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_weight_with_nan_is_an_error_and_no_rank(method: Decomposition) -> None:
    weight = normal(6, 5, 3, 3, seed=0)
    moments = moments_of_weight(weight)
    weight[0, 0, 0, 0] = float("nan")
    rank = method.ranks(weight.shape)[0]
    for work in (lambda: method.errors(weight, moments), lambda: method.decompose(weight, rank, moments)):
        with pytest.raises(NumericsError):
            work()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rf.CP(sweeps=0), "CP.sweeps"),
        (lambda: rf.CP(restarts=-1), "CP.restarts"),
        (lambda: rf.CP(tolerance=2.0), "CP.tolerance"),
        (lambda: rf.TensorTrain(tied=1), "TensorTrain.tied"),
        (lambda: rf.TensorTrain(multiple_of=0), "TensorTrain.multiple_of"),
        (lambda: rf.Tucker(damping=-1.0), "Tucker.damping"),
        (lambda: rf.ASVD(alpha=1.5), "ASVD.alpha"),
        (lambda: rf.FisherSVD(damping=2.0), "FisherSVD.damping"),
        (lambda: rf.KroneckerSVD(output_damping=2.0), "KroneckerSVD.damping"),
        (lambda: rf.FeaturePCA(multiple_of=0), "FeaturePCA.multiple_of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_named(make: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make()


@pytest.mark.parametrize("method", [*METHODS, rf.TensorTrain(separable=False), rf.CP(whitened=False)], ids=str)
def test_the_whole_road(method: Decomposition) -> None:
    """Compressed with repair within the budget, saved and loaded; counted as predicted."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 5, stride=2, padding=2, groups=2)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5)).eval()
    data = list(torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(32))
    out = rf.compress(model, data, families=[method], budget=rf.Budget(params=0.85), exclude=["5"])
    assert out.report.after.params <= 0.85 * out.report.before.params
    assert any(decision.method is not None for decision in out.plan.decisions)
    assert rf.Plan.from_json(out.plan.to_json()) == out.plan
    dense = rf.merge(out.model, out.plan)
    assert torch.allclose(dense(data[0]), out.model(data[0]), atol=1e-4)


@pytest.mark.parametrize(
    "family", [rf.SpatialSVD(), rf.CP(), rf.TensorTrain(), rf.Tucker(), rf.Tucker2()], ids=lambda each: str(each)
)
def test_layers_without_a_kernel_are_no_case_for_families_of_kernels(family: Decomposition) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten()).eval()
    with pytest.raises(BudgetError, match=r"none of the families given makes it smaller.*, or allow more families"):
        rf.compress(model, [torch.randn(8, 8, 4, 4)], families=[family], budget=rf.Budget(params=0.6))
    with pytest.raises(OptionError, match="leave the site out"):
        rf.compress(
            model,
            [torch.randn(8, 8, 4, 4)],
            families=[family],
            selector=rf.Fixed({"0": family.ranks((16, 8, 3, 3))[0]}),
        )

"""Penalties against slow references and finite differences, their weight beside the loss, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import NumericsError, OptionError, SiteError
from rankfold.testing.matrices import normal
from rankfold.training import FirstDerivative, NuclearNorm, Orthogonality, Regularizer, SecondDerivative
from rankfold.training.nuclear import nuclear_norm, soft_threshold


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


def value(penalty: Regularizer, weight: Tensor) -> Tensor:
    found = penalty.penalty(weight)
    assert found is not None
    return found


def first(weight: Tensor, power: int) -> float:
    """Mean over all pairs of neighbouring output channels, one at a time."""
    total, count = 0.0, 0
    for group in weight:
        for below, above in pairwise(group):
            total += float((above - below).abs().pow(power).sum())
            count += below.numel()
    return total / count


@pytest.mark.parametrize("power", [1, 2])
def test_derivatives_are_means_of_differences(power: int) -> None:
    weight = normal(2, 5, 3, 4, 4, seed=0)
    assert float(value(FirstDerivative(1.0, power=power), weight)) == pytest.approx(first(weight, power))
    steps = weight[:, 2:] - 2 * weight[:, 1:-1] + weight[:, :-2]
    expected = float(steps.abs().pow(power).mean())
    assert float(value(SecondDerivative(1.0, power=power), weight)) == pytest.approx(expected)


def test_axes_are_those_of_the_weight() -> None:
    weight = normal(1, 5, 6, 3, 4, seed=1)
    along = {"out": weight.diff(dim=1), "in": weight.diff(dim=2)}
    for axis, change in along.items():
        found = float(value(FirstDerivative(1.0, axis=axis), weight))
        assert found == pytest.approx(float(change.square().mean()))
    both = float(value(FirstDerivative(1.0, axis="kernel"), weight))
    assert both == pytest.approx(float(weight.diff(dim=3).square().mean() + weight.diff(dim=4).square().mean()))
    several = float(value(FirstDerivative(1.0, axis=("out", "kernel")), weight))
    assert several == pytest.approx(both + float(along["out"].square().mean()))
    assert FirstDerivative(1.0, axis="kernel").penalty(normal(1, 5, 6, seed=0)) is None


def test_a_weight_that_changes_evenly_has_no_second_derivative() -> None:
    even = torch.arange(6.0)[None, :, None] * normal(1, 1, 4, seed=0) + normal(1, 1, 4, seed=1)
    assert float(value(SecondDerivative(1.0), even)) == pytest.approx(0, abs=1e-20)
    assert float(value(FirstDerivative(1.0), even)) > 0.01


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 5, 5), (3, 4, 8)])
def test_the_nuclear_norm_is_the_sum_of_the_singular_values(shape: tuple[int, ...]) -> None:
    matrix = normal(*shape, seed=0)
    assert float(nuclear_norm(matrix)) == pytest.approx(float(torch.linalg.svdvals(matrix).sum()), rel=1e-9)
    ours, theirs = matrix.clone().requires_grad_(), matrix.clone().requires_grad_()
    nuclear_norm(ours).mul(1.7).backward()
    torch.linalg.svdvals(theirs).sum().mul(1.7).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


def test_the_nuclear_norm_of_a_low_rank_matrix_has_a_finite_gradient() -> None:
    matrix = (normal(8, 2, seed=0) @ normal(2, 12, seed=1)).requires_grad_()
    nuclear_norm(matrix).backward()
    u, _, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    torch.testing.assert_close(matrix.grad, u[:, :2] @ vh[:2], rtol=1e-6, atol=1e-8)
    zero = torch.zeros(3, 4, requires_grad=True)
    nuclear_norm(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))  # type: ignore[arg-type]


def test_in_single_precision_it_is_exact_to_a_millionth() -> None:
    matrix = (normal(64, 4, seed=0) @ normal(4, 576, seed=1) + 1e-3 * normal(64, 576, seed=2)).float()
    exact = float(torch.linalg.svdvals(matrix.double()).sum())
    assert float(nuclear_norm(matrix)) == pytest.approx(exact, rel=1e-6)


def test_matrices_of_the_nuclear_norm() -> None:
    weight = normal(2, 4, 3, 5, 7, seed=0)
    own = sum(float(torch.linalg.matrix_norm(group.flatten(1), "nuc")) for group in weight)
    assert float(value(NuclearNorm(1.0), weight)) == pytest.approx(own)
    spatial = sum(float(torch.linalg.matrix_norm(group.permute(0, 2, 1, 3).reshape(20, 21), "nuc")) for group in weight)
    assert float(value(NuclearNorm(1.0, matrix="spatial"), weight)) == pytest.approx(spatial)
    assert NuclearNorm(1.0, matrix="spatial").penalty(normal(1, 4, 3, seed=0)) is None


PENALTIES: list[Regularizer] = [
    FirstDerivative(1.0),
    FirstDerivative(1.0, axis=("in", "kernel"), power=1),
    SecondDerivative(1.0),
    NuclearNorm(1.0),
    NuclearNorm(1.0, matrix="spatial"),
    Orthogonality(1.0, of="all"),
    Orthogonality(1.0, of="all", kind="double"),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda each: type(each).__name__)
def test_gradients_are_those_of_finite_differences(penalty: Regularizer) -> None:
    weight = normal(2, 3, 4, 2, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: value(penalty, each), (weight,))


def test_orthogonality_is_zero_for_orthonormal_columns_and_counts_the_smaller_side() -> None:
    tall = torch.linalg.qr(normal(9, 4, seed=0))[0][None]
    for kind in ("soft", "spectral"):
        assert float(value(Orthogonality(1.0, kind=kind, of="all"), tall)) == pytest.approx(0, abs=1e-12)
        assert float(value(Orthogonality(1.0, kind=kind, of="all"), tall.mT)) == pytest.approx(0, abs=1e-12)
    assert float(value(Orthogonality(1.0, kind="double", of="all"), tall)) == pytest.approx(5)
    matrix = normal(1, 9, 4, seed=1)
    gram = matrix[0].mT @ matrix[0] - torch.eye(4)
    assert float(value(Orthogonality(1.0, of="all"), matrix)) == pytest.approx(float(gram.square().sum()))
    largest = float(torch.linalg.eigvalsh(gram).abs().max())
    assert float(value(Orthogonality(1.0, kind="spectral", of="all"), matrix)) == pytest.approx(largest, rel=0.02)


def test_the_proximal_step_takes_off_singular_values() -> None:
    matrix = normal(6, 9, seed=0)
    values = torch.linalg.svdvals(matrix)
    found = torch.linalg.svdvals(soft_threshold(matrix, float(values[3])))
    torch.testing.assert_close(found, (values - values[3]).clamp_min(0), rtol=1e-9, atol=1e-9)
    model = network().double()
    before = {name: each.clone() for name, each in model.named_parameters()}
    NuclearNorm(0.5, only=["0", "3"]).proximal_(model, 0.1)
    for name, each in model.named_parameters():
        if name in ("0.weight", "3.weight"):
            groups = (1 if name[0] == "0" else 2, -1)
            old, new = (torch.linalg.svdvals(w.flatten(1).unflatten(0, groups)) for w in (before[name], each.detach()))
            torch.testing.assert_close(new, (old - 0.05).clamp_min(0), rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(each, before[name])
    with pytest.raises(OptionError, match="the penalty has a weight"):
        NuclearNorm(share=0.1).proximal_(model, 0.1)


def test_it_is_the_weighted_sum_over_the_chosen_layers() -> None:
    model = network()
    values = {path: float(each.detach()) for path, each in FirstDerivative(1.0).values(model).items()}
    assert list(values) == ["0", "3", "5"]
    total = sum(values.values())
    assert float(FirstDerivative(0.3)(model).detach()) == pytest.approx(0.3 * total, rel=1e-6)
    chosen = FirstDerivative(0.3, only=["[03]"], exclude=["3"])(model)
    assert float(chosen.detach()) == pytest.approx(0.3 * values["0"], rel=1e-6)


def test_a_share_of_the_loss_is_held() -> None:
    model, penalty = network(), SecondDerivative(share=0.05)
    for loss in (2.0, 2.0, 2.0):
        assert float(penalty(model, torch.tensor(loss)).detach()) == pytest.approx(0.1, rel=1e-5)
    for _ in range(600):  # the loss falls: the running mean follows
        last = float(penalty(model, torch.tensor(0.5)).detach())
    assert last == pytest.approx(0.025, rel=1e-3)


def test_a_penalty_that_is_not_trained_on_does_not_move_the_means() -> None:
    model, penalty = network(), SecondDerivative(share=0.05)
    penalty(model, torch.tensor(2.0))
    state = penalty.state_dict()
    with torch.no_grad():
        penalty(model, torch.tensor(50.0))
    assert penalty.state_dict() == state


def test_state_goes_on_where_it_stopped() -> None:
    model, penalty, again = network(), FirstDerivative(share=0.2), FirstDerivative(share=0.2)
    for loss in (3.0, 2.0, 1.0):
        penalty(model, torch.tensor(loss))
    again.load_state_dict(penalty.state_dict())
    assert torch.equal(penalty(model, torch.tensor(0.7)), again(model, torch.tensor(0.7)))
    fresh = FirstDerivative(share=0.2)
    fresh.load_state_dict(FirstDerivative(share=0.2).state_dict())
    assert fresh.state_dict() == {"means": None}


def test_under_autocast_and_in_half_precision_it_is_computed_in_single() -> None:
    model = network()
    expected = NuclearNorm(1e-3)(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = NuclearNorm(1e-3)(model)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert NuclearNorm(1e-3)(network().to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_model_is_looked_through() -> None:
    model = network()
    compiled = torch.compile(model)
    assert torch.equal(FirstDerivative(1.0)(compiled), FirstDerivative(1.0)(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FirstDerivative(), "a weight, or a share of the loss · got neither"),
        (lambda: FirstDerivative(0.1, share=0.1), "got both"),
        (lambda: NuclearNorm(0.0), r"NuclearNorm\.weight"),
        (lambda: NuclearNorm(share=-1.0), r"NuclearNorm\.share"),
        (lambda: NuclearNorm(float("nan")), r"NuclearNorm\.weight"),
        (lambda: NuclearNorm(1.0, matrix="in"), r"NuclearNorm\.matrix · 'out' or 'spatial'"),
        (lambda: FirstDerivative(1.0, axis="rows"), r"FirstDerivative\.axis"),
        (lambda: FirstDerivative(1.0, axis=()), r"FirstDerivative\.axis"),
        (lambda: SecondDerivative(1.0, power=3), r"SecondDerivative\.power"),
        (lambda: Orthogonality(1.0, kind="hard"), r"Orthogonality\.kind"),
        (lambda: Orthogonality(1.0, of="inner"), r"Orthogonality\.of"),
        (lambda: FirstDerivative(1.0, only="0"), "a list of paths or patterns"),
    ],
)
def test_bad_options_are_named(make: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make()


def test_a_penalty_that_matches_no_layer_is_an_error() -> None:
    model = network()
    with pytest.raises(SiteError, match="'head' · a selection names layers of the model"):
        FirstDerivative(1.0, only=["head"])(model)
    with pytest.raises(SiteError, match="a layer that the penalty says something about"):
        FirstDerivative(1.0, axis="kernel", only=["5"])(model)
    with pytest.raises(SiteError, match=r"call rankfold\.training\.overparameterize first"):
        Orthogonality(1.0)(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad: float) -> None:
    model = network()
    with pytest.raises(NumericsError, match="the loss of which the penalty is a share is finite"):
        FirstDerivative(share=0.1)(model, torch.tensor(bad))
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = bad
    with pytest.raises(NumericsError, match="FirstDerivative at '3'"):
        FirstDerivative(1.0)(model)


def test_a_share_needs_the_loss() -> None:
    with pytest.raises(OptionError, match=r"penalty\(model, loss\)"):
        FirstDerivative(share=0.1)(network())


def test_tables_are_left_out_and_a_weight_of_two_layers_counts_once() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    assert list(NuclearNorm(1.0).values(model)) == ["1"]
    table, values = model[0].weight.detach().clone(), torch.linalg.svdvals(model[1].weight.detach())
    NuclearNorm(1.0).proximal_(model, 0.1)
    assert torch.equal(model[0].weight, table)  # type: ignore[arg-type]
    found = torch.linalg.svdvals(model[1].weight.detach())
    torch.testing.assert_close(found, (values - 0.1).clamp_min(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(SiteError, match="a layer that the penalty says something about"):
        NuclearNorm(1.0)(nn.Sequential(nn.Embedding(20, 8)))


def test_a_weight_that_is_computed_has_no_proximal_step() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert float(NuclearNorm(1.0)(model).detach()) > 0
    with pytest.raises(SiteError, match="a weight that is a parameter"):
        NuclearNorm(1.0).proximal_(model, 0.1)


def test_a_small_weight_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NuclearNorm at '0'"):
        NuclearNorm(1.0)(model)
    with pytest.raises(NumericsError, match="every weight is finite"):
        NuclearNorm(1.0).proximal_(model, 0.1)
    with pytest.raises(OptionError, match="the loss is a tensor"):
        FirstDerivative(share=0.1)(network(), 0.5)  # type: ignore[arg-type]

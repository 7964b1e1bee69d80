"""All methods are measured in one metric, whatever moments they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.decompositions import (
    SVD,
    Decomposition,
    Moments,
    SpatialSVD,
    Tucker2,
    WhitenedSVD,
    factorise,
    output_errors,
)
from rankfold.decompositions.weighting import damped_gradients
from rankfold.install.fill import unrepaired
from rankfold.plan import Decision
from rankfold.testing.matrices import normal


def moments(features: int, outputs: int | None, *, seed: int = 0) -> Moments:
    """Of inputs whose scales differ by orders of magnitude."""
    rows = normal(200, features, seed=seed) * torch.logspace(-2, 1, features, dtype=torch.float64)
    gradients = None if outputs is None else normal(50, outputs, seed=seed + 1)
    return Moments(rows.mT @ rows / 200, gradient_gram=None if gradients is None else gradients.mT @ gradients / 50)


def true_error(method: Decomposition, weight: Tensor, rank: int, own: Moments, judge: Moments) -> float:
    """`tr(G D B Dᵀ)`, written out."""
    change = (weight - factorise(method, weight, rank, own).reconstruct()).flatten(1)
    metric = judge.metric(method)
    left = torch.eye(len(change)).double() if judge.gradient_gram is None else damped_gradients(judge.gradient_gram)
    return float((left @ change @ metric @ change.mT).trace())


@pytest.mark.parametrize("outputs", [None, 8])
@pytest.mark.parametrize("method", [SVD(), WhitenedSVD(damping=0.0)])
def test_a_curve_is_the_error_in_the_metric_of_the_inputs(method: Decomposition, outputs: int | None) -> None:
    weight = normal(8, 12, seed=5)
    own, judge = moments(12, outputs), moments(12, outputs, seed=7)
    for given in (None, judge):
        errors, energy = output_errors(method, weight, own, given)
        for rank, error in zip(method.ranks(weight.shape), errors.tolist(), strict=True):
            expected = true_error(method, weight, int(rank), own, own if given is None else given)  # type: ignore[arg-type]
            assert error * energy == pytest.approx(expected, rel=1e-4, abs=1e-9 * energy)


def test_the_better_method_has_the_lower_curve() -> None:
    weight, own = normal(8, 12, seed=5), moments(12, None)
    plain, white = (output_errors(method, weight, own)[0] for method in (SVD(), WhitenedSVD()))
    assert bool((white <= plain + 1e-9).all())
    assert bool((white[:-1] < plain[:-1]).any())


@pytest.mark.parametrize("method", [SpatialSVD(), Tucker2(), SVD(mirrored=True)])
def test_between_anchors_a_judged_curve_is_near_the_truth(method: Decomposition) -> None:
    weight = normal(6, 5 * 9, seed=2).reshape(6, 5, 3, 3)
    own, judge = moments(45, None), moments(45, None, seed=3)
    found = method.judged_errors(weight, own, judge)
    total = float((weight.flatten(1) @ judge.metric(method)).mul(weight.flatten(1)).sum())
    for rank, error in zip(method.ranks(weight.shape), found.tolist(), strict=True):
        change = (weight - method.decompose(weight, rank, own).reconstruct()).flatten(1)
        expected = float((change @ judge.metric(method)).mul(change).sum()) / total
        assert error == pytest.approx(expected, rel=0.35, abs=0.02)


@pytest.mark.parametrize("method", [SVD(), WhitenedSVD()])
def test_the_guard_compares_with_what_no_repair_builds(method: Decomposition) -> None:
    """A method that reads no inputs leaves the bias as it is: inputs with a large mean tell."""
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    x = torch.randn(80, 12, generator=torch.Generator().manual_seed(0)) + 3
    out = rf.compress(model, [x], budget=rf.Budget(params=0.7), families=[method], repair=None, selector=rf.Uniform())
    sites = rf.find_sites(model, x)
    stats = rf.collect(model, [x[torch.arange(80) % 5 != 4]], sites=sites, positions=64, enough=24)
    rf.collect_gradients(model, [x[torch.arange(80) % 5 != 4]], stats, sites=sites)
    decision: Decision = out.plan.at("0")
    assert decision.method is not None
    factors, bias = unrepaired(decision, model[0], stats)
    built = out.model[0]
    with torch.no_grad():
        expected = x.double() @ factors[0].reconstruct().flatten(1).mT + bias
        torch.testing.assert_close(built(x).double(), expected, rtol=1e-4, atol=1e-4)
    if not method.needs:
        assert bias is not None
        assert torch.equal(bias.float(), model[0].bias)

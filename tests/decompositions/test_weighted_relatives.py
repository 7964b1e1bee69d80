"""ASVD, FisherSVD, KroneckerSVD and FeaturePCA against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.decompositions import Decomposition, Moments, damped_gradients, factorise
from rankfold.errors import DataError
from rankfold.statistics import InputGroups
from rankfold.testing.matrices import moments_of_weight, normal


def weight() -> Tensor:
    return normal(9, 14, seed=0)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


def test_asvd_is_the_truncated_scaled_weight() -> None:
    moments = moments_of_weight(weight())
    assert moments.gram is not None
    scales = moments.gram.diagonal() ** 0.25
    expected = truncated(weight() * scales, 4) / scales
    assert torch.allclose(rf.ASVD().decompose(weight(), 4, moments).reconstruct(), expected, atol=1e-9)
    plain = rf.SVD().decompose(weight(), 4, Moments()).reconstruct()
    assert torch.allclose(rf.ASVD(alpha=0.0).decompose(weight(), 4, moments).reconstruct(), plain, atol=1e-9)


def test_fisher_is_the_truncated_weight_with_rows_scaled() -> None:
    moments = moments_of_weight(weight())
    method = rf.FisherSVD(damping=0.0)
    scales = method.output_metric(moments).diagonal().sqrt()[:, None]
    expected = truncated(scales * weight(), 4) / scales
    assert torch.allclose(method.decompose(weight(), 4, moments).reconstruct(), expected, atol=1e-9)


def test_kronecker_is_the_whitened_svd_with_output_weighting() -> None:
    moments = moments_of_weight(weight())
    expected = factorise(rf.WhitenedSVD(), weight(), 4, moments).reconstruct()
    found = factorise(rf.KroneckerSVD(), weight(), 4, moments).reconstruct()
    assert torch.allclose(found, expected, atol=1e-8)
    # and no other map of this rank is closer in its metric
    felt, gram = damped_gradients(moments.gradients(rf.KroneckerSVD())), moments.metric(rf.KroneckerSVD())

    def lost(other: Tensor) -> float:
        return float((felt * ((weight() - other) @ gram @ (weight() - other).mT)).sum())

    for method in (rf.SVD(), rf.WhitenedSVD(), rf.FisherSVD(), rf.ASVD()):
        assert lost(found) <= lost(method.decompose(weight(), 4, moments).reconstruct()) * (1 + 1e-6)


@pytest.mark.parametrize("method", [rf.FisherSVD(), rf.KroneckerSVD()], ids=str)
def test_gradients_that_were_not_collected_are_named(method: Decomposition) -> None:
    without = replace(moments_of_weight(weight()), gradient_gram=None)
    with pytest.raises(DataError, match="weighting=True"):
        method.decompose(weight(), 3, without)


def test_feature_pca_is_the_principal_components_of_the_outputs() -> None:
    inputs = normal(400, 14, seed=2) @ normal(14, 14, seed=3) + 5 * normal(14, seed=4)
    groups = inputs.split(100)
    for group in groups:
        group += 3 * normal(14, seed=int(group.sum()) % 97)
    outputs = [group @ weight().mT for group in groups]
    pooled = sum(torch.cov(each.mT, correction=0) for each in outputs)
    assert isinstance(pooled, Tensor)
    basis = torch.linalg.eigh(pooled / len(groups)).eigenvectors.flip(-1)[:, :4]
    expected = basis @ basis.mT @ weight()
    statistic = InputGroups()
    for group in groups:
        statistic.update(group[None])
    gram, mean = inputs.mT @ inputs / 400, inputs.mean(0)
    moments = Moments(gram, mean, groups=statistic.mean()[0])
    method = rf.FeaturePCA(multiple_of=2, damping=0.0)
    assert torch.allclose(method.decompose(weight(), 4, moments).reconstruct(), expected, atol=1e-8)
    alone = method.decompose(weight(), 4, replace(moments, groups=None)).reconstruct()
    assert not torch.allclose(alone, expected, atol=1e-3)  # what differs between groups is in the plain covariance


def test_feature_pca_gives_a_layer_the_bias_it_lacks() -> None:
    """`b = (I − U_rU_rᵀ) E[y]`: the mean output stays, and costs one number an output."""
    layer = nn.Sequential(nn.Linear(14, 12, bias=False)).double()
    data = list((normal(96, 14, seed=5) + 3 * normal(14, seed=6)).split(32))
    out = rf.compress(layer, data, families=[rf.FeaturePCA(multiple_of=1)], budget=rf.Budget(params=0.7), repair=None)
    (shell,) = out.model.children()
    first, last = shell.children()
    assert first.bias is None
    assert last.bias is not None
    inputs = torch.cat(data)
    inputs = inputs[torch.arange(96) % out.plan.calibration["held_out"] != out.plan.calibration["held_out"] - 1]
    assert len(inputs) == out.plan.calibration["samples"]
    assert out.report.after.params == sum(p.numel() for p in out.model.parameters())
    with torch.no_grad():
        assert torch.allclose(out.model(inputs).mean(0), layer(inputs).mean(0), atol=1e-6)
    repaired = rf.compress(layer, data, families=[rf.FeaturePCA(multiple_of=1)], budget=rf.Budget(params=0.7))
    assert next(iter(repaired.model.children()))[1].bias is not None


@pytest.mark.parametrize("method", [rf.ASVD(), rf.FisherSVD(), rf.KroneckerSVD(), rf.FeaturePCA()], ids=str)
def test_the_whole_road(method: Decomposition) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48, bias=False), nn.ReLU(), nn.Linear(48, 6)]
    model = nn.Sequential(*layers).eval()
    data = list(torch.randn(96, 24, generator=torch.Generator().manual_seed(1)).split(32))
    out = rf.compress(model, data, families=[method], budget=rf.Budget(params=0.6))
    assert out.report.after.params <= 0.6 * out.report.before.params
    assert rf.Plan.from_json(out.plan.to_json()) == out.plan
    assert torch.allclose(rf.merge(out.model, out.plan)(data[0]), out.model(data[0]), atol=1e-4)
    if "gradient-gram" in method.needs:
        with pytest.raises(DataError, match="gradient"):
            rf.compress(model, data, families=[method], budget=rf.Budget(params=0.6), weighting=False)


@pytest.mark.parametrize("repair", [None, rf.Lockstep()], ids=["plain", "repair"])
def test_channels_may_go_beside_feature_pca(repair: rf.Lockstep | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6)).eval()
    data = list(torch.randn(72, 10, generator=torch.Generator().manual_seed(1)).split(24))
    families: list[rf.Family] = [rf.FeaturePCA(multiple_of=2), rf.Interpolative()]
    out = rf.compress(model, data, families=families, budget=rf.Budget(params=0.5), repair=repair)
    assert out.report.after.params <= 0.5 * out.report.before.params


def test_a_plan_of_gradients_alone_is_applied_with_data() -> None:
    model, data = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 6)).eval(), list(torch.randn(3, 24, 10))
    out = rf.compress(model, data, families=[rf.FisherSVD()], budget=rf.Budget(params=0.8), repair=None)
    again = rf.apply(model, out.plan, data)
    with torch.no_grad():
        assert torch.equal(again(data[0]), out.model(data[0]))

"""Cuts whose predicted changes of the loss cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.allocation import Option, Problem
from rankfold.allocation._base import Table
from rankfold.allocation._zero_sum import _descent
from rankfold.allocation.measuring import changes_of
from rankfold.decompositions import SVD
from rankfold.errors import DataError, OptionError
from rankfold.testing import SelectorConformance
from rankfold.testing.matrices import moments_of_weight, normal
from rankfold.testing.problems import random_problem, with_bounds


def with_changes(problem: Problem) -> Problem:
    """Changes of the loss drawn for every option of the plain SVD."""
    changes = {}
    for i, options in enumerate(problem.options):
        ranks = [option.rank for option in options if option.method == SVD()]
        drawn = normal(len(ranks), seed=i).cumsum(0).tolist() if ranks else []
        changes[problem.sites[i].path, SVD()] = dict(zip(ranks, drawn, strict=True))
    return replace(problem, changes=changes)  # type: ignore[arg-type]


class TestZeroSum(SelectorConformance):
    selector = rf.ZeroSum()

    def allowed(self, options: Sequence[Option], option: Option) -> bool:
        return option.method in (None, SVD())

    def problems(self, resources: Sequence[str], **options: Any) -> list[Problem]:
        return [with_changes(each) for each in super().problems(resources, families=(SVD(),), **options)]

    def test_bounds_that_exclude_each_other_are_an_error(self) -> None:
        pytest.skip("its options have no predicted changes, which is refused first")


@pytest.mark.parametrize("method", [rf.SVD(), rf.WhitenedSVD(), rf.ASVD(), rf.Pivoted()], ids=str)
def test_changes_are_inner_products_with_the_gradient(method: rf.Decomposition) -> None:
    weight, gradient = normal(7, 9, seed=0), normal(7, 9, seed=1)
    moments = moments_of_weight(weight)
    changes = method.changes(weight, moments, gradient)
    assert changes is not None
    for rank, change in zip(method.ranks(weight.shape), changes.tolist(), strict=True):
        moved = method.decompose(weight, rank, moments).reconstruct() - weight
        assert change == pytest.approx(float((gradient * moved).sum()), abs=1e-9)


def test_methods_without_nested_ranks_have_none() -> None:
    weight = normal(6, 5, 3, 3, seed=0)
    for method in (rf.CP(), rf.Tucker2(), rf.SVD(mirrored=True), rf.WhitenedSVD(mirrored=True)):
        assert method.changes(weight, moments_of_weight(weight), normal(6, 45, seed=1)) is None


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 24), nn.ReLU(), nn.Linear(24, 6)).eval()


def data(labels: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(96, 3, 8, 8, generator=generator).split(32)
    return [(x, torch.randint(6, (len(x),), generator=generator)) if labels else x for x in parts]


@pytest.mark.parametrize("labels", [False, True], ids=["own decisions", "labels"])
def test_the_gradient_is_that_of_the_loss(labels: bool) -> None:
    """Grouped convolutions and linear layers against autograd on the whole data; what was frozen stays frozen."""
    model, batches = network(), data(labels)
    model[0].weight.requires_grad_(False)
    sites = rf.find_sites(model, batches[0])
    stats = rf.collect(model, batches, sites=sites, statistics=["input-gram", "input-mean"])
    rf.collect_gradients(model, batches, stats, sites=sites, samples=96, outputs=rf.Logits(), loss=True)
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    inputs = torch.cat([batch[0] if labels else batch for batch in batches])
    logits = model(inputs)
    wanted = torch.cat([batch[1] for batch in batches]) if labels else logits.argmax(-1)
    weight = model[2].weight
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(logits, wanted), [weight])
    found = stats.sites["2"]["loss-gradient"].mean()
    assert torch.allclose(found.float(), expected.unflatten(0, (2, -1)).flatten(2), atol=1e-6)
    told = changes_of(model, stats, sites=sites, families=[rf.WhitenedSVD()])
    assert {path for path, _ in told} == {"0", "2", "5", "7"}


def test_the_whole_road() -> None:
    model, batches = network(), data()
    options: dict[str, Any] = {"families": [rf.WhitenedSVD()], "outputs": rf.Logits(), "selector": rf.ZeroSum()}
    out = rf.compress(model, batches, budget=rf.Budget(params=0.5), **options)
    assert out.report.after.params <= 0.5 * out.report.before.params
    assert rf.Plan.from_json(out.plan.to_json()) == out.plan


def test_changes_of_opposite_sign_take_turns() -> None:
    """Every step of one half of the sites raises the loss by one, every step of the other lowers it."""
    problem = random_problem(3, resources=("params",), families=(SVD(),), sites=8)
    changes = {}
    for i, (site, options) in enumerate(zip(problem.sites, problem.options, strict=True)):
        ranks = [option.rank for option in options if option.rank is not None]
        changes[site.path, SVD()] = {rank: (-1.0) ** i * (len(ranks) - k) for k, rank in enumerate(ranks)}
    ladders = [
        np.array([0.0, *sorted(changes[site.path, SVD()].values(), key=abs)])
        for site in problem.sites  # from dense to the least rank
    ]
    kept = tuple((own[0], *own[:0:-1]) for own in problem.options)
    whole = problem.total([own[0] for own in kept]).params
    problem = with_bounds(replace(problem, options=kept), params=int(0.8 * whole))  # neither half is used up
    chosen = _descent(problem, Table.of(problem), ladders)
    assert chosen is not None
    assert sum(chosen) > 4
    total = sum(ladder[k] for ladder, k in zip(ladders, chosen, strict=True))
    assert abs(total) <= 1


def test_what_it_cannot_work_with_is_named() -> None:
    model, batches = network(), data()
    options: dict[str, Any] = {"budget": rf.Budget(params=0.5), "selector": rf.ZeroSum(), "outputs": rf.Logits()}
    with pytest.raises(OptionError, match="nested"):
        rf.compress(model, batches, families=[rf.SpatialSVD()], only=["0", "2"], **options)
    with pytest.raises(OptionError, match="weighting=True"):
        rf.compress(model, batches, families=[rf.WhitenedSVD()], weighting=False, **options)
    with pytest.raises(DataError, match="scores of classes"):
        rf.compress(model, batches, families=[rf.WhitenedSVD()], **(options | {"outputs": rf.Values()}))
    with pytest.raises(OptionError, match="nested"):
        rf.ZeroSum().select(random_problem(0, resources=("params",)))


def test_labels_count_and_a_shared_folder_serves_both_selectors(tmp_path: Path) -> None:
    options: dict[str, Any] = {"families": [rf.WhitenedSVD()], "outputs": rf.Logits(), "budget": rf.Budget(params=0.5)}
    folder = tmp_path / "work"
    rf.compress(network(), data(labels=True), **options, selector=rf.Lagrangian(), work_dir=folder)
    out = rf.compress(network(), data(labels=True), **options, selector=rf.ZeroSum(), work_dir=folder)
    assert out.plan == rf.compress(network(), data(labels=True), **options, selector=rf.ZeroSum()).plan
    assert out.plan.decisions != rf.compress(network(), data(), **options, selector=rf.ZeroSum()).plan.decisions
    more: dict[str, Any] = options | {"families": [rf.WhitenedSVD(), rf.Interpolative()]}
    with pytest.raises(OptionError, match="no channels"):
        rf.compress(network(), data(), **more, selector=rf.ZeroSum())

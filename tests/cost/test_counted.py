"""Formulas equal counts on the live module; counts equal arithmetic done by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from rankfold.cost.counted import count, count_bytes, count_macs, count_params, run_one
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import RESOURCES, Cost
from rankfold.decompositions import Decomposition
from rankfold.errors import PlanError
from rankfold.plan.making import decision_cost, plan_cost
from rankfold.testing import random_network, toy_network

FAMILIES: tuple[Decomposition, ...] = (rf.SVD(), rf.SVD(mirrored=True), rf.SpatialSVD(whitened=False))


def _everywhere(sites: Any, method: Decomposition, position: float) -> rf.Plan:
    """A plan that gives every site the method can have a rank at a relative position of its candidates."""
    decisions = []
    for site in sites:
        shape = site.geometry.canonical_shape
        if method.refuses(shape) is not None:
            decisions.append(rf.Decision(site.path))
            continue
        ranks = method.ranks(shape)
        decisions.append(rf.Decision(site.path, method, ranks[int(position * (len(ranks) - 1))]))
    return rf.Plan(tuple(decisions), sites.skips, sites.fingerprint)


@pytest.mark.parametrize("method", FAMILIES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_predicted_cost_equals_the_counted_one(seed: int, method: Decomposition) -> None:
    model, x = random_network(seed)
    sites = rf.find_sites(model, x)
    for position in (0.0, 0.3, 1.0):
        plan = _everywhere(sites, method, position)
        assert plan_cost(sites, plan) == count(rf.apply(model, plan), x)


def test_predicted_cost_equals_torchs_own_counter() -> None:
    model, x = toy_network()
    sites = rf.find_sites(model, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sites.cost.macs == counter.get_total_flops() / 2 / len(x)
    fixed = sites.cost.macs - sum(site.macs for site in sites)
    assert fixed == 0


def test_a_sites_dense_cost_is_that_of_its_layer() -> None:
    model, x = toy_network()
    sites = rf.find_sites(model, x)
    modules = dict(model.named_modules())
    for site in sites:
        assert dense_cost(site).params == count_params(modules[site.path])
        assert dense_cost(site).bytes == count_bytes(modules[site.path])
        assert decision_cost(site, rf.Decision(site.path)) == dense_cost(site)
        assert decision_cost(site, rf.Decision(site.path, rf.SVD(), 2)) == site_cost(site, "matrix", 2)


def test_cost_grows_with_rank() -> None:
    model, x = toy_network()
    for site in rf.find_sites(model, x):
        costs = [site_cost(site, "matrix", rank) for rank in (1, 2, 3)]
        for less, more in itertools.pairwise(costs):
            assert all(less.amounts()[name] < more.amounts()[name] for name in ("params", "macs", "bytes"))
            assert all(less.amounts()[name] <= more.amounts()[name] for name in RESOURCES)


def test_half_precision_halves_the_bytes() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(2, 8)
    full = rf.find_sites(model, x)
    half = rf.find_sites(model.bfloat16(), x.bfloat16())
    assert half.cost == replace(full.cost, bytes=full.cost.bytes // 2)
    assert site_cost(half[0], "matrix", 2).bytes * 2 == site_cost(full[0], "matrix", 2).bytes


def test_a_plan_that_names_another_models_site_has_no_cost() -> None:
    model, x = toy_network()
    sites = rf.find_sites(model, x)
    with pytest.raises((PlanError, LookupError), match="'elsewhere'"):
        plan_cost(sites, rf.Plan((rf.Decision("elsewhere"),), (), sites.fingerprint))


def test_costs_add_and_subtract_by_resource() -> None:
    a, b = Cost(3, 20, 100), Cost(1, 5, 60)
    assert a + b == Cost(4, 25, 160)
    assert a - b == Cost(2, 15, 40)
    assert {name: amount for name, amount in a.amounts().items() if amount} == {"params": 3, "macs": 20, "bytes": 100}
    assert list(a.amounts()) == list(RESOURCES)


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert count_params(model) == 64 + 16
    assert count_bytes(model) == 4 * (64 + 16)


def test_aliases_of_one_memory_count_their_bytes_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert count_bytes(model) == 4 * 64


def test_bytes_are_those_of_the_state_dict() -> None:
    model = nn.BatchNorm2d(4).half()
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert count_bytes(model) == 4 * 4 * 2 + 8  # weight, bias, mean, variance, and the int64 counter
    assert count_params(model) == 8


def test_lazy_parameters_have_no_size_yet() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert count_params(model) == 6
    assert count_bytes(model) == 4 * 6 + 8


class Attention(nn.Module):
    """Attention by torch's fused function and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_fused_attention_counts_its_two_products() -> None:
    assert count_macs(Attention(), torch.randn(3, 2, 5, 8)) == 2 * (2 * 5 * 5 * 8)


def test_counting_leaves_torchs_switches_alone() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    count_macs(Attention(), torch.randn(3, 2, 5, 8))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        count_macs(nn.Linear(2, 2), torch.randn(2, 3))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_a_model_of_a_fixed_batch_is_run_whole_and_counted_per_sample() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(6, 4))  # type: ignore[no-any-return]

    model, x = Fixed(), torch.randn(6, 4)
    assert run_one(model, x) == 6
    assert run_one(nn.Linear(4, 4), x) == 1
    assert count_macs(model, x) == 16
    assert rf.find_sites(model, x)[0].macs == 16

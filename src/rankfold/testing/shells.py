"""Laws of the layers made from a decomposition: built, filled, counted, and put into a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankfold.allocation import Budget, Curves
from rankfold.allocation.measuring import measure, needed
from rankfold.cost.counted import count
from rankfold.cost.formula import site_cost
from rankfold.decompositions import Decomposition
from rankfold.errors import BudgetError
from rankfold.factors import Factors, Rank
from rankfold.install.fill import filler, install_shells
from rankfold.install.merging import merge
from rankfold.layers import Adapter, adapter_for, build_shell, fill_shell, form_of, serves, stages
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.plan.making import make_plan, plan_cost
from rankfold.registry import lookup
from rankfold.sites.copies import copied
from rankfold.sites.finding import find_sites, fingerprint
from rankfold.sites.site import Site, Sites
from rankfold.statistics import GradientGram, Statistic, Statistics
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import collect_gradients
from rankfold.testing.devices import generator_states, same_states
from rankfold.testing.layers import ALWAYS_BIASED, LAYERS, toy_layer
from rankfold.testing.matrices import normal
from rankfold.testing.networks import toy_network

_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
class ShellLaws:
    """Laws of layers; see `DecompositionConformance` for the attributes."""

    method: ClassVar[Decomposition]
    layers: ClassVar[tuple[str, ...]] = LAYERS

    def served(self, *, bias: bool = True, **options: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Name, layer and inputs of every toy layer that the method has a case for; options go to `toy_layer`."""
        for name in self.layers:
            if bias or name not in ALWAYS_BIASED:
                layer, inputs = toy_layer(name, bias=bias, **options)
                own = _adapter(layer).geometry(layer)
                if self.method.refuses(own.canonical_shape) is None and serves(self.method.form, own):
                    yield name, layer, inputs

    def compressed(self, layer: nn.Module, inputs: Tensor, rank: Rank) -> nn.Module:
        """The layer as `rankfold.apply` makes it, on statistics of these inputs."""
        plan = Plan((Decision("", self.method, rank),), (), fingerprint(layer))
        return install_shells(copied(layer), plan, filler(_statistics(self.method, layer, inputs)))

    def ranks(self, layer: nn.Module) -> list[Rank]:
        """First, middle and last candidate of the ranks."""
        ranks = self.method.ranks(_adapter(layer).geometry(layer).canonical_shape)
        return [ranks[index] for index in sorted({0, len(ranks) // 2, len(ranks) - 1})]

    def test_it_has_a_case_among_the_layers(self) -> None:
        """A method that refuses every layer would pass every other law without being looked at."""
        assert any(True for _ in self.served())

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
    def test_shell_equals_the_dense_layer_of_the_product(self, bias: bool, device: str) -> None:
        """`shell(fill(F))(x)` equals the output of the original layer with `F.reconstruct()` as its weight."""
        for name, layer, inputs in self.served(bias=bias, device=device):
            adapter = _adapter(layer)
            weight = adapter.canonical(layer)
            geometry, statistics = adapter.geometry(layer), _statistics(self.method, layer, inputs)
            for rank in self.ranks(layer):
                groups = _decompose(self.method, layer, rank, statistics)
                shell = build_shell(geometry, self.method.form, rank, device=weight.device, dtype=weight.dtype)
                fill_shell(shell, groups, adapter.bias(layer))
                dense = copy.deepcopy(layer)
                with torch.no_grad():
                    adapter.canonical(dense).copy_(torch.stack([factors.reconstruct() for factors in groups]))
                    _assert_close(shell(inputs), dense(inputs), 1e-9, name)

    def test_merging_gives_the_outputs_of_the_shell(self, device: str) -> None:
        """A shell multiplied out to one dense layer again gives the same outputs, in double precision."""
        for name, layer, inputs in self.served(device=device):
            for rank in self.ranks(layer):
                plan = Plan((Decision("", self.method, rank),), (), fingerprint(layer))
                shell = install_shells(copied(layer), plan, filler(_statistics(self.method, layer, inputs)))
                with torch.no_grad():
                    _assert_close(merge(shell, plan)(inputs), shell(inputs), 1e-8, name)

    def test_full_rank_gives_the_layer_back(self, device: str) -> None:
        """In double precision the compressed layer at its last candidate equals the original layer."""
        for name, layer, inputs in self.served(device=device):
            with torch.no_grad():
                _assert_close(self.compressed(layer, inputs, self.ranks(layer)[-1])(inputs), layer(inputs), 1e-7, name)

    def test_predicted_cost_equals_the_counted_one(self, device: str) -> None:
        """Parameters, MACs per sample (by torch's own counter) and bytes of the live shell are as predicted."""
        for name, layer, inputs in self.served(dtype=torch.float32, device=device):
            adapter = _adapter(layer)
            site = Site("", (), adapter.kind, adapter.geometry(layer), (adapter.sample_size(layer, inputs[:1]),), 4)
            for rank in self.ranks(layer):
                counted = count(self.compressed(layer, inputs, rank), inputs)
                assert counted == site_cost(site, self.method.form, rank), (name, rank)

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
    def test_bias_is_neither_lost_nor_added(self, bias: bool, device: str) -> None:
        """The stages have a bias where the form says so, of one entry an output in all."""
        for name, layer, inputs in self.served(bias=bias, device=device):
            rank, geometry = self.ranks(layer)[0], _adapter(layer).geometry(layer)
            parts = list(self.compressed(layer, inputs, rank).children())
            expected = [stage.bias for stage in stages(geometry, self.method.form, rank)]
            assert [part.bias is not None for part in parts] == expected, name
            entries = sum(part.bias.numel() for part in parts if isinstance(part.bias, Tensor))
            adds = form_of(self.method.form).adds_bias
            assert entries == (geometry.outputs if bias or adds else 0), name

    def test_the_mean_output_is_kept_where_a_bias_can_absorb_it(self, device: str) -> None:
        """A method that reads the mean input leaves the mean output over the calibration inputs as it was."""
        if "input-mean" not in self.method.needs:
            pytest.skip("the method does not read the mean input")
        for name, layer, inputs in self.served(device=device):
            adapter = _adapter(layer)
            with torch.no_grad():
                found = adapter.outputs(layer, self.compressed(layer, inputs, self.ranks(layer)[0])(inputs)).mean(1)
                _assert_close(found, adapter.outputs(layer, layer(inputs)).mean(1), 1e-9, name)

    def test_no_storage_is_shared_with_the_original(self, device: str) -> None:
        """Neither weights nor bias share storage with the original, which keeps its bits."""
        for name, layer, inputs in self.served(device=device):
            before = [parameter.detach().clone() for parameter in layer.parameters()]
            shell = self.compressed(layer, inputs, self.ranks(layer)[-1])
            owners = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
            with torch.no_grad():
                for parameter in shell.parameters():
                    assert parameter.untyped_storage().data_ptr() not in owners, name
                    parameter.zero_()
            assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)), name

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
    def test_dtype_device_mode_and_gradients_are_kept(
        self, dtype: torch.dtype, training: bool, frozen: bool, device: str
    ) -> None:
        """Every module and parameter of the shell is as the layer's were."""
        _, layer, inputs = next(self.served(dtype=dtype, device=device))
        layer.train(training).requires_grad_(not frozen)
        shell = self.compressed(layer, inputs, self.ranks(layer)[0])
        assert {module.training for module in shell.modules()} == {training}
        expected = {(dtype, _adapter(layer).canonical(layer).device, not frozen)}
        assert {(p.dtype, p.device, p.requires_grad) for p in shell.parameters()} == expected
        assert all(parameter.is_leaf for parameter in shell.parameters())

    def test_same_bits_and_no_global_generator(self, device: str) -> None:
        """Building and filling twice gives equal bits, and draws nothing from the global generators."""
        for name, layer, inputs in self.served(dtype=torch.float32, device=device):
            before = generator_states()
            first, second = (self.compressed(layer, inputs, self.ranks(layer)[0]) for _ in range(2))
            assert same_states(before, generator_states()), name
            assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3], ids=str)
    def test_half_layers_stay_finite(self, dtype: torch.dtype, scale: float, device: str) -> None:
        """Outputs are finite where the original's are; and full rank gives these back up to the dtype's rounding."""
        for name, layer, inputs in self.served(dtype=dtype, device=device):
            with torch.no_grad():
                expected = layer(inputs * scale).float()
                assert bool(torch.isfinite(expected).all()), name
                for rank in self.ranks(layer):
                    found = self.compressed(layer, inputs * scale, rank)(inputs * scale).float()
                    assert bool(torch.isfinite(found).all()), (name, rank)
            assert float((found - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps, name

    @pytest.mark.parametrize("scale", [1e20, 1e-20], ids=str)
    def test_scaled_layers_stay_finite(self, scale: float, device: str) -> None:
        """In float32, weights of scale 1e±20 on inputs of scale 1e∓20 give finite results, intermediate ones too."""
        for name, layer, inputs in self.served(dtype=torch.float32, device=device):
            with torch.no_grad():
                _adapter(layer).canonical(layer).mul_(scale)
                expected = layer(inputs / scale)
                shell = self.compressed(layer, inputs / scale, self.ranks(layer)[-1])
                # CUDA convolutions may round float32 to the 10 bits of TF32.
                _assert_close(shell(inputs / scale), expected, 1e-4 if device == "cpu" else 1e-2, name)

    def test_no_budget_is_exceeded_and_predictions_hold(self, device: str) -> None:
        """On a whole network, the counted cost equals the predicted one and is within the bound."""
        network, inputs, sites = _sites(device)
        statistics = collect(network, inputs, sites=sites, statistics=needed([self.method]))
        if GradientGram.name in self.method.needs:
            collect_gradients(network, [inputs], statistics, sites=sites, samples=8)
        curves = measure(network, statistics, sites=sites, families=[self.method])
        assert len(curves) > 0
        for resource, fraction in product(("params", "macs", "bytes"), (0.3, 0.55, 0.8, 0.99)):
            budget = Budget(**{resource: fraction})
            bound = budget.bounds(sites.cost)[resource]
            plan, reachable = _plan(curves, budget, resource)
            if plan is None:
                assert reachable > bound
                continue
            counted = count(install_shells(copied(network), plan, filler(statistics)), inputs)
            assert counted == plan_cost(sites, plan)
            assert counted.amounts()[resource] <= bound


@lru_cache(maxsize=2)
def _sites(device: str) -> tuple[nn.Module, Tensor, Sites]:
    network, inputs = toy_network(device=device)
    return network, inputs, find_sites(network, inputs)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Assert that two tensors are equal up to a tolerance relative to the largest value."""
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def _plan(curves: Curves, budget: Budget, resource: str) -> tuple[Plan | None, int]:
    """A plan within a budget; where there is none, the smallest amount that can be reached."""
    try:
        return make_plan(curves, budget=budget), 0
    except BudgetError as infeasible:
        return None, infeasible.smallest[resource]


def _adapter(layer: nn.Module) -> Adapter:
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{type(layer).__name__} has no adapter")
    return adapter


def _statistics(method: Decomposition, layer: nn.Module, inputs: Tensor) -> Statistics:
    """The statistics that a method needs, collected over one batch of inputs."""
    adapter = _adapter(layer)
    own: dict[str, Statistic] = {}
    with torch.no_grad():
        patches, outputs = adapter.patches(layer, inputs), adapter.outputs(layer, layer(inputs))
    for name in method.needs:
        own[name] = lookup(name, Statistic)()
        own[name].update(patches, normal(*outputs.shape, seed=7).to(outputs) if name == GradientGram.name else outputs)
    return Statistics({"": own})


def _decompose(method: Decomposition, layer: nn.Module, rank: Rank, statistics: Statistics) -> list[Factors]:
    adapter = _adapter(layer)
    geometry = adapter.geometry(layer)
    site = Site("", (), adapter.kind, geometry, (), 8)
    weight = widen(adapter.canonical(layer))
    return [method.decompose(weight[group], rank, statistics.moments(site, group)) for group in range(geometry.groups)]

"""The shell of factors stored by pivots."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.decompositions import Pivoted
from rankfold.errors import OptionError, PlanError
from rankfold.layers import Geometry, PivotedLayer, adapter_for, build_shell, fill_shell, stages
from rankfold.sites.site import Site
from rankfold.testing.matrices import normal

PLAIN = rf.SVD()


def shell_of(layer: nn.Module, method: rf.Decomposition, rank: int | tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """The shell of a layer at a rank, and the dense layer of the same map."""
    adapter = adapter_for(layer)
    assert adapter is not None
    weight = adapter.canonical(layer)
    groups = [method.decompose(group, rank, rf.Moments()) for group in weight]
    shell = build_shell(adapter.geometry(layer), method.form, rank, device=weight.device, dtype=weight.dtype)
    fill_shell(shell, groups, adapter.bias(layer))
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        adapter.canonical(dense).copy_(torch.stack([factors.reconstruct() for factors in groups]))
    return shell, dense


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 12), (16, 16)])
def test_every_rank_below_full_is_smaller_than_the_layer(inputs: int, outputs: int) -> None:
    site = Site("", (), "linear", Geometry(inputs, outputs, bias=True), (((), 3),), 4)
    dense, full = dense_cost(site), min(inputs, outputs)
    for rank in range(1, full):
        cost = site_cost(site, Pivoted().form, rank)
        assert cost.params == rank * (inputs + outputs - rank) + outputs < dense.params
        assert cost.macs == 3 * rank * (inputs + outputs - rank) < dense.macs
    assert site_cost(site, Pivoted().form, full) == dense


@pytest.mark.parametrize("inputs", [12, 20])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_is_exact_to_its_rounding(inputs: int, bias: bool) -> None:
    layer = nn.Linear(inputs * 16, 256, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(256, inputs * 16, seed=1) / 16)
    shell, dense = shell_of(layer, Pivoted(PLAIN), 100)
    x = normal(64, inputs * 16, seed=2).float()
    with torch.no_grad():
        assert float((shell(x) - dense(x)).norm() / dense(x).norm()) < 1e-6


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("inputs", [6, 12])
def test_a_pointwise_convolution_with_steps_padding_and_groups(mode: str, inputs: int) -> None:
    layer = nn.Conv2d(inputs, 9, 1, stride=(2, 1), padding=(1, 2), groups=3, padding_mode=mode).double()
    shell, dense = shell_of(layer, Pivoted(PLAIN), 1)
    x = normal(2, inputs, 5, 7, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(shell(x), dense(x))
        torch.testing.assert_close(shell(x[0]), dense(x[0]))  # without an axis of samples


def test_it_is_called_like_the_layer_it_replaces() -> None:
    shell, dense = shell_of(nn.Linear(6, 8).double(), Pivoted(PLAIN), 3)
    x = normal(4, 6, seed=4)
    torch.testing.assert_close(shell(input=x), dense(x))


def test_a_rank_deficient_map_is_stored_exactly() -> None:
    layer = nn.Linear(12, 10).double()
    with torch.no_grad():
        layer.weight.copy_(normal(10, 2, seed=5) @ normal(2, 12, seed=6))
    for rank in (1, 2, 5, 9):
        shell, dense = shell_of(layer, Pivoted(PLAIN), rank)
        assert all(bool(torch.isfinite(p).all()) for p in shell.parameters())
        x = normal(3, 12, seed=7)
        torch.testing.assert_close(shell(x), dense(x))


def test_halving_the_network_keeps_the_indices() -> None:
    shell, dense = shell_of(nn.Linear(24, 24), Pivoted(PLAIN), 20)
    x = normal(5, 24, seed=8)
    with torch.no_grad():
        expected = dense.double()(x)
        found = shell.to(torch.bfloat16)(x.to(torch.bfloat16)).double()
    assert {buffer.dtype for buffer in shell.buffers()} == {torch.int32}
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_it_is_exported_and_traced() -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1)
    shell, dense = shell_of(conv, Pivoted(rf.Tucker2(whitened=False)), (4, 5))
    x = normal(2, 6, 5, 5, seed=9).float()
    exported = torch.export.export(shell, (x,)).module()
    torch.testing.assert_close(exported(x), dense(x), rtol=1e-4, atol=1e-5)
    inner = rf.find_sites(shell, x)
    assert [site.path for site in inner] == ["input", "core", "output"]


@pytest.mark.parametrize("budget", [rf.Budget(params=0.6), rf.Budget(bytes=0.6), rf.Budget(macs=0.6)])
def test_a_network_is_compressed_saved_loaded_and_compressed_again(budget: rf.Budget, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

    torch.manual_seed(0)
    model, data = build(), [normal(64, 16, seed=10).float()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = rf.compress(model, data, budget=budget, families=[Pivoted()])
        rf.save(out, tmp_path / "x")
        again = rf.load(tmp_path / "x", factory=build)
        assert any(isinstance(module, PivotedLayer) for module in again.modules())
        assert torch.equal(out.model(data[0]), again(data[0]))
        merged = rf.merge(again, out.plan)
        torch.testing.assert_close(merged(data[0]), again(data[0]), rtol=1e-4, atol=1e-5)
        rf.compress(again, data, budget=rf.Budget(params=0.9), families=[Pivoted()])


@pytest.mark.parametrize("method", [rf.SpatialSVD(), Pivoted(), "svd", rf.Interpolative()])
def test_a_method_without_a_pointwise_end_is_refused(method: object) -> None:
    with pytest.raises(OptionError, match=r"Pivoted\.method"):
        Pivoted(method)  # type: ignore[arg-type]


def test_other_factors_are_refused() -> None:
    weight: Tensor = normal(4, 3, 3, 3, seed=11)
    with pytest.raises(OptionError, match="pointwise"):
        rf.PivotedFactors(rf.SpatialSVD(whitened=False).decompose(weight, 2, rf.Moments()))


def test_a_rank_above_the_channels_is_refused() -> None:
    with pytest.raises(PlanError, match="above the channels"):
        stages(Geometry(6, 8), "pivoted-matrix", 7)


def test_kernels_can_be_left_out() -> None:
    method = Pivoted(kernels=False)
    assert method.refuses((8, 6, 3, 3)) == "kernels=False leaves out what has a kernel larger than 1"
    assert method.refuses((8, 6, 1, 1)) is None
    assert method.refuses((8, 6)) is None


def test_a_map_is_offered_once_at_a_layer_in_the_smaller_storage() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    sites = rf.find_sites(model, normal(2, 3, 6, 6, seed=12).float())
    families = [PLAIN, Pivoted(PLAIN, kernels=False)]
    curves = rf.measure(model, sites=sites, families=families)
    assert [(curve.site.path, curve.method) for curve in curves] == [("0", families[0]), ("2", families[1])]

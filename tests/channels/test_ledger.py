"""Channels and ranks on one state: costs are those of the state, and no move at its price is worth making."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.allocation import Curves, Option
from rankfold.allocation.measuring import measure
from rankfold.channels.elimination import RemovalCurve
from rankfold.channels.ledger import _Layer
from rankfold.channels.stacks import Widths, stacks_of
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import RESOURCES
from rankfold.decompositions import Decomposition
from rankfold.errors import BudgetError, OptionError
from rankfold.sites.site import Site

X = torch.zeros(2, 6)
FAMILIES: list[Decomposition] = [
    rf.SVD(),
    rf.SVD(mirrored=True),
    rf.Pivoted(rf.SVD()),
    rf.SpatialSVD(whitened=False),
    rf.Tucker2(whitened=False),
    rf.Pivoted(rf.Tucker2(whitened=False)),
]


def _sites() -> list[Site]:
    model = nn.Sequential(
        nn.Conv2d(4, 12, 3, 2, padding=1),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 20, 1, bias=False),
        nn.Flatten(),
        nn.Linear(20 * 25, 10),
    )
    return list(rf.find_sites(model.eval(), torch.zeros(2, 4, 9, 9)).with_fixed())


def _narrow(site: Site, inputs: int, outputs: int) -> Site:
    groups = inputs if site.geometry.groups > 1 else 1
    return replace(site, geometry=replace(site.geometry, inputs=inputs, outputs=outputs, groups=groups))


@pytest.mark.parametrize("resource", RESOURCES)
def test_the_cost_of_an_option_is_that_of_the_layer_with_the_channels_it_has_left(resource: str) -> None:
    for site in _sites():
        depthwise = site.geometry.groups > 1
        options = [Option(None, None, dense_cost(site), 0.0)]
        for method in FAMILIES:
            if not depthwise and method.refuses(site.geometry.canonical_shape) is None:
                rank = method.ranks(site.geometry.canonical_shape)[0]
                options.append(Option(method, rank, site_cost(site, method.form, rank), 0.1))
        layer = _Layer(site, options, {resource: 1.0})
        for inputs, outputs in ((site.geometry.inputs, site.geometry.outputs), (4, 6), (3, 9)):
            sizes = (inputs, inputs) if depthwise else (inputs, outputs)
            own = _narrow(site, *sizes)
            shares = (
                np.array([size / whole])
                for size, whole in zip(sizes, (site.geometry.inputs, site.geometry.outputs), strict=True)
            )
            for option, cost in zip(options, layer.costs(*shares)[0, :, 0], strict=True):
                exact = (
                    dense_cost(own) if option.method is None else site_cost(own, option.method.form, option.rank or 0)
                )
                byte = 8 if resource == "bytes" else 0  # the index of a channel is counted on one side
                assert cost == pytest.approx(exact.amounts()[resource], abs=1e-6 + byte * sum(sizes))


def _chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


def _widths(bound: int, slopes: list[float], *, ranks: float | None = None, tensor: str = "params") -> Widths:
    """Widths of a chain whose removal curves are squares; errors of ranks are scaled, or there are none."""
    model = _chain()
    sites = rf.find_sites(model, X)
    curves = [
        RemovalCurve(group, torch.arange(group.units), slope * torch.arange(group.units + 1).double().square())
        for group, slope in zip(rf.find_channels(model, sites), slopes, strict=True)
    ]
    measured = measure(model, sites=sites, families=[rf.Pivoted(rf.SVD())])
    scaled = [replace(c, errors=tuple(e * (ranks or 0) for e in c.errors)) for c in measured]
    known = Curves(sites, () if ranks is None else tuple(scaled))
    return Widths(model, curves, sites, {tensor: bound}, stacks_of([curve.group for curve in curves]), known)


def _params(a: int, b: int) -> int:
    return 7 * a + (a + 1) * b + (b + 1) * 4


@pytest.mark.parametrize("slopes", [[1.0, 1.0], [1.0, 0.05], [0.02, 1.0]])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_of_channels_alone_the_least_error_on_the_hull_is_found(share: float, slopes: list[float]) -> None:
    bound = int(_params(12, 10) * share)
    widths = _widths(bound, slopes)
    rf.Ledger().select(widths)
    a, b = widths.left
    assert _params(a, b) <= bound

    def error(a: int, b: int) -> float:
        return slopes[0] * (12 - a) ** 2 + slopes[1] * (10 - b) ** 2

    pairs = list(itertools.product(range(1, 13), range(1, 11)))
    best = min(error(*pair) for pair in pairs if _params(*pair) <= bound)
    tighter = min(error(*pair) for pair in pairs if _params(*pair) <= bound - 20)  # one step of either group
    assert best - 1e-9 <= error(a, b) <= tighter + 1e-9


def test_ranks_that_cost_nothing_leave_the_channels_alone() -> None:
    bound = int(_params(12, 10) * 0.6)
    free = _widths(bound, [1.0, 1.0], ranks=1e-9)
    rf.Ledger().select(free)
    assert free.left == [12, 10]
    dear = _widths(bound, [1e-6, 1e-6], ranks=1e3)
    rf.Ledger().select(dear)
    assert _params(*dear.left) <= bound


def test_dearer_ranks_take_more_channels() -> None:
    counts = []
    for ranks in (1e-3, 1.0, 1e3):
        widths = _widths(int(_params(12, 10) * 0.5), [0.01, 0.01], ranks=ranks)
        rf.Ledger().select(widths)
        counts.append(sum(widths.left))
    assert counts[0] >= counts[1] >= counts[2]
    assert counts[0] > counts[2]


def test_bounds_below_the_smallest_are_refused() -> None:
    with pytest.raises(BudgetError, match="the smallest"):
        rf.Ledger().select(_widths(5, [1.0, 1.0]))


@pytest.mark.parametrize(
    "shares", [{"params": 0.9, "macs": 0.4}, {"params": 0.4, "macs": 0.95}, {"params": 0.5, "macs": 0.5}]
)
def test_every_bound_holds_and_what_has_room_is_not_cut(shares: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 5),
    ).eval()
    sites = rf.find_sites(model, torch.zeros(2, 3, 8, 8))
    curves = [
        RemovalCurve(group, torch.arange(group.units), torch.arange(group.units + 1).double().square())
        for group in rf.find_channels(model, sites)
    ]
    whole = sites.cost.amounts()
    bounds = {name: int(whole[name] * share) for name, share in shares.items()}
    widths = Widths(model, curves, sites, bounds, stacks_of([curve.group for curve in curves]), Curves(sites, ()))
    rf.Ledger().select(widths)
    left = widths.cost.amounts()
    assert all(left[name] <= bound for name, bound in bounds.items())
    assert any(left[name] >= 0.85 * bound for name, bound in bounds.items())


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "1"])
def test_a_scale_that_is_no_factor_is_refused(scale: object) -> None:
    with pytest.raises(OptionError, match=r"Ledger\.scale"):
        rf.Ledger(scale=scale)  # type: ignore[arg-type]


def test_dearer_channels_leave_more_of_them() -> None:
    left = []
    for scale in (0.01, 1.0, 100.0):
        widths = _widths(int(_params(12, 10) * 0.5), [0.01, 0.01], ranks=1.0)
        rf.Ledger(scale=scale).select(widths)
        left.append(sum(widths.left))
    assert left == sorted(left)
    assert left[0] < left[-1]

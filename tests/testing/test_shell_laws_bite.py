"""The laws of layers fail where the road from a plan to a layer breaks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rankfold.allocation import Budget
from rankfold.cost.resources import Cost
from rankfold.decompositions import SVD, Decomposition, WhitenedSVD
from rankfold.install.fill import filler, install_shells
from rankfold.plan.making import make_plan
from rankfold.testing import DecompositionConformance, shells

LAYERS = ("linear", "conv2d grouped")


def suite(method: Decomposition) -> DecompositionConformance:
    return type("Suite", (DecompositionConformance,), {"layers": LAYERS, "method": method})()


def with_surgeon(change: Callable[[nn.Module, nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Install shells as ever, then let a function change the shell, given the original layer too."""
    originals: list[nn.Module] = []

    def install(model: nn.Module, plan: Any, fill: Any) -> nn.Module:
        shell = install_shells(model, plan, fill)
        change(shell, originals[-1])
        return shell

    monkeypatch.setattr(shells, "copied", lambda model: (originals.append(model), model)[1])
    monkeypatch.setattr(shells, "install_shells", install)


def test_a_lost_mean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(statistics: Any) -> Callable[..., None]:
        def fill(decision: Any, layer: Any, shell: Any) -> None:
            filler(statistics)(decision, layer, shell)
            with torch.no_grad():
                shell[-1].bias.copy_(layer.bias)

        return fill

    suite(WhitenedSVD()).test_the_mean_output_is_kept_where_a_bias_can_absorb_it("cpu")
    monkeypatch.setattr(shells, "filler", forgetful)
    with pytest.raises(AssertionError):
        suite(WhitenedSVD()).test_the_mean_output_is_kept_where_a_bias_can_absorb_it("cpu")


@pytest.mark.parametrize("more", [Cost(1, 0, 0), Cost(0, 1, 0), Cost(0, 0, 1)], ids=["params", "macs", "bytes"])
def test_a_cost_that_is_not_the_counted_one_is_caught(more: Cost, monkeypatch: pytest.MonkeyPatch) -> None:
    site_cost = shells.site_cost
    monkeypatch.setattr(shells, "site_cost", lambda *arguments: site_cost(*arguments) + more)
    with pytest.raises(AssertionError):
        suite(SVD()).test_predicted_cost_equals_the_counted_one("cpu")


def test_a_lost_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with_surgeon(lambda shell, layer: setattr(shell[-1], "bias", None), monkeypatch)
    with pytest.raises(AssertionError):
        suite(SVD()).test_bias_is_neither_lost_nor_added(True, "cpu")


def test_an_added_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with_surgeon(lambda shell, layer: setattr(shell[0], "bias", nn.Parameter(torch.zeros(1))), monkeypatch)
    for bias in (True, False):
        with pytest.raises(AssertionError):
            suite(SVD()).test_bias_is_neither_lost_nor_added(bias, "cpu")


def test_a_shared_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with_surgeon(lambda shell, layer: setattr(shell[-1], "bias", layer.bias), monkeypatch)
    with pytest.raises(AssertionError):
        suite(SVD()).test_no_storage_is_shared_with_the_original("cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda shell, layer: shell.train(not layer.training),
        lambda shell, layer: shell.requires_grad_(not layer.weight.requires_grad),
        lambda shell, layer: shell.double(),
    ],
    ids=["mode", "gradients", "dtype"],
)
def test_a_lost_mode_gradient_or_dtype_is_caught(
    change: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_surgeon(change, monkeypatch)
    with pytest.raises(AssertionError):
        suite(SVD()).test_dtype_device_mode_and_gradients_are_kept(torch.float32, True, True, "cpu")


def test_a_shell_of_another_geometry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    build = shells.build_shell

    def unpadded(*arguments: Any, **options: Any) -> nn.Sequential:
        shell = build(*arguments, **options)
        for layer in shell:
            if isinstance(layer, nn.Conv2d):
                layer.stride = (2, 2)
        return shell  # type: ignore[return-value]

    monkeypatch.setattr(shells, "build_shell", unpadded)
    with pytest.raises(AssertionError):
        suite(SVD()).test_shell_equals_the_dense_layer_of_the_product(True, "cpu")


def test_an_exceeded_budget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "make_plan", lambda curves, budget: make_plan(curves, budget=Budget(params=1.0)))
    with pytest.raises(AssertionError):
        suite(SVD()).test_no_budget_is_exceeded_and_predictions_hold("cpu")


def test_a_wrong_prediction_of_the_whole_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_cost = shells.plan_cost
    monkeypatch.setattr(shells, "plan_cost", lambda sites, plan: plan_cost(sites, plan) + Cost(macs=1))
    with pytest.raises(AssertionError):
        suite(SVD()).test_no_budget_is_exceeded_and_predictions_hold("cpu")

"""Bad budgets, options, sites and plans are refused by name, and the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.reference.refusals import BUDGET, inputs, network, refused, untouched
from torch import Tensor, nn

import rankfold as rf
from rankfold.cost.counted import count
from rankfold.errors import (
    BudgetError,
    DataError,
    ModelError,
    OptionError,
    PlanError,
    SiteError,
    TraceError,
)

# The budget and other options.


SEEDS: list[Any] = [True, -1, 2**63, 1.5, None]


@pytest.mark.parametrize("name", ["params", "macs", "bytes"])
@pytest.mark.parametrize("bound", [0, 0.0, -1, -0.5, 1.5, True, False, float("nan"), float("inf"), "0.5"])
def test_a_bound_that_is_no_fraction_and_no_number_is_refused(name: str, bound: Any) -> None:
    message = (
        rf"^Budget\.{name} · a kept fraction in \(0, 1\] \(float\) or an absolute .* · got {bound!r} · .*{name}=0\.5"
    )
    with pytest.raises(BudgetError, match=message):
        rf.Budget(**{name: bound})


def test_a_budget_without_a_bound_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"^Budget · at least one bound · got none · .*Budget\(params=0\.5\)"):
        rf.Budget()


@pytest.mark.parametrize("resource", ["params", "macs", "bytes"])
def test_an_infeasible_budget_names_the_smallest_value_which_is_feasible(resource: str) -> None:
    model, data = network().eval(), inputs()
    with untouched(model), pytest.raises(BudgetError, match=rf"^Budget\.{resource} · .* · raise the bound") as caught:
        rf.compress(model, data, budget=rf.Budget(**{resource: 1}), families=[rf.SVD()], repair=None, weighting=False)
    smallest = caught.value.smallest[resource]
    assert f"{resource} at most 1 where the smallest is {smallest} (" in str(caught.value)
    sites = rf.find_sites(model, data)
    curves = rf.measure(model, sites=sites, families=[rf.SVD()])
    plan = rf.make_plan(curves, budget=rf.Budget(**{resource: smallest}))
    assert count(rf.apply(model, plan), data).amounts()[resource] == smallest
    with pytest.raises(BudgetError, match=f"smallest is {smallest} "):
        rf.make_plan(curves, budget=rf.Budget(**{resource: smallest - 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"^budget · a rankfold\.Budget · got 0\.5 · try rankfold\.Budget\(params=0\.5\)"),
        ({"families": []}, r"^families · at least one method · got none · try \["),
        (
            {"families": [rf.SVD]},
            r"^families · instances of methods · got <class .*SVD'> · try SVD\(\) with parentheses",
        ),
        ({"selector": rf.Uniform}, r"^selector · an instance of Selector · got <class"),
        ({"repair": True}, r"^repair · an instance of Lockstep, or None · got True · try rankfold\.Lockstep\(\)"),
        ({"positions": 0}, r"^positions · an int of at least 1, or None · got 0"),
        ({"positions": True}, r"^positions · an int of at least 1, or None · got True"),
        ({"families": rf.SVD()}, r"^families · a list of methods · got SVD\(.*\) · put it in brackets"),
        ({"families": 3}, r"^families · a list of methods · got 3 · try \[rankfold\.WhitenedSVD"),
        ({"work_dir": 3}, r"^work_dir · the path of a directory, or None · got 3 · pass a path"),
        ({"progress": None}, r"^progress · a function of a stage.* · got None · pass rankfold\.progress_bar\(\)"),
        ({"weighting": 1}, r"^weighting · True or False · got 1 · pass a bool"),
        *(({"seed": seed}, rf"^seed · an int from 0 to 2\*\*63 - 1 · got {seed}") for seed in SEEDS),
        ({"seed": 10**90}, r"^seed · an int from 0 .* · got 10{78}… · leave it out"),
    ],
)
def test_an_option_of_another_kind_is_refused(options: dict[str, Any], message: str) -> None:
    refused(OptionError, message, network(), inputs(), **options)


# Comparing.


@pytest.mark.parametrize(
    ("change", "data", "error", "message"),
    [
        (
            lambda m: (None, m),
            inputs(),
            ModelError,
            r"^original · an nn\.Module · got NoneType · pass the module itself",
        ),
        (
            lambda m: (m, inputs()),
            None,
            ModelError,
            r"^compressed · an nn\.Module · got Tensor · pass the module itself",
        ),
        (lambda m: (m, copy.deepcopy(m).to("meta")), inputs(), ModelError, r"^0\.weight · every tensor is on a real"),
        (
            lambda m: (m, m),
            [inputs(), torch.zeros(8, 11)],
            TraceError,
            r"^batch 2 · both models run on every batch of the data · got .* from the original model · give models of",
        ),
        (
            lambda m: (m, copy.deepcopy(m).double()),
            inputs(),
            TraceError,
            r"^batch 1 · .* from the compressed model · give models of one dtype",
        ),
        (
            lambda m: (m, m),
            [(inputs(4), torch.zeros(4).long()), (inputs(4), torch.zeros(3).long())],
            DataError,
            r"^batch 2 · as many labels as samples · got 3 labels of shape \(3,\) for 4 samples · give each",
        ),
    ],
    ids=["original", "compressed", "meta", "shape", "dtype", "labels"],
)
def test_two_models_that_cannot_be_compared_are_refused(
    change: Callable[[nn.Module], tuple[Any, Any]], data: Any, error: type[Exception], message: str
) -> None:
    model = network()
    original, compressed = change(model)
    with untouched(model), pytest.raises(error, match=message):
        rf.compare(original, compressed, data)


# The steps one by one.


@pytest.mark.parametrize(
    ("argument", "given", "message"),
    [
        ("curves", None, r"^curves · an instance of Curves · got None · pass what rankfold\.measure gave"),
        ("curves", [], r"^curves · an instance of Curves · got \[\]"),
        ("repair", True, r"^repair · an instance of Lockstep · got True · try rankfold\.Lockstep\(\), or None"),
        *(("seed", seed, rf"^seed · an int from 0 .* · got {seed}") for seed in SEEDS),
    ],
)
def test_a_plan_of_another_kind_of_argument_is_refused(argument: str, given: Any, message: str) -> None:
    model = network()
    curves = rf.measure(model, sites=rf.find_sites(model, inputs()), families=[rf.SVD()])
    with pytest.raises(OptionError, match=message):
        rf.make_plan(**{"curves": curves, "budget": BUDGET, argument: given})


class Other(nn.Module):
    """Layers that the perceptron has not."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(x)
        return result


def _collect(model: Any, sites: Any) -> object:
    return rf.collect(model, inputs(), sites=sites)


def _measure(model: Any, sites: Any) -> object:
    return rf.measure(model, sites=sites, families=[rf.SVD()])


@pytest.mark.parametrize("step", [_collect, _measure])
@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        (None, OptionError, r"^sites · what rankfold\.find_sites returned · got None · pass rankfold\.find_sites"),
        (["0"], OptionError, r"^sites · .* · got \['0'\]"),
        (Other(), SiteError, r"^'other' · every site is a layer of the model · got sites of another model, a Other"),
        (network().double(), SiteError, r"^sites · sites of a model with the same .* · got fingerprint .* Sequential"),
    ],
    ids=["none", "list", "missing", "dtype"],
)
def test_sites_of_another_model_are_refused(
    step: Callable[[Any, Any], object], sites: Any, error: type[Exception], message: str
) -> None:
    model = network()
    if isinstance(sites, nn.Module):
        sites = rf.find_sites(sites, inputs().to(next(sites.parameters()).dtype))
    with untouched(model), pytest.raises(error, match=message):
        step(model, sites)


@pytest.mark.parametrize("step", [_collect, _measure])
def test_no_model_is_refused_by_each_step(step: Callable[[Any, Any], object]) -> None:
    with pytest.raises(ModelError, match=r"^model · an nn\.Module · got NoneType"):
        step(None, rf.find_sites(network(), inputs()))


def test_other_options_of_a_step_are_refused() -> None:
    model = network()
    sites = rf.find_sites(model, inputs())
    with pytest.raises(OptionError, match=r"^stats · an instance of Statistics, or None · got \{\}"):
        rf.measure(model, {}, sites=sites)  # type: ignore[arg-type]
    for seed in SEEDS:
        with pytest.raises(OptionError, match=rf"^seed · an int from 0 .* · got {seed}"):
            rf.collect(model, inputs(), sites=sites, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [None, {}])
def test_what_is_no_plan_is_not_carried_out(plan: Any) -> None:
    model = network()
    with untouched(model), pytest.raises(PlanError, match=rf"^plan · an instance of Plan · got {plan} · read a file"):
        rf.execute(model, inputs(), plan)


# A model in training mode.


def _compress(model: nn.Module) -> nn.Module:
    return rf.compress(model, inputs(), budget=BUDGET).model


def _compress_plainly(model: nn.Module) -> nn.Module:
    return rf.compress(model, inputs(), budget=BUDGET, repair=None, weighting=False).model


@pytest.mark.parametrize("compress", [_compress, _compress_plainly])
def test_a_model_in_training_mode_is_traced_in_eval_and_left_in_its_modes(
    compress: Callable[[nn.Module], nn.Module],
) -> None:
    model = network().train()
    model[5].eval()
    with untouched(model):
        result = compress(model)
    assert [module.training for module in result.children()] == [module.training for module in model.children()]
    assert result.training
    assert all(module.training for index, child in enumerate(result) if index != 5 for module in child.modules())  # type: ignore[var-annotated]
    twin = compress(copy.deepcopy(model).eval())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(result.parameters(), twin.parameters(), strict=True))


def test_selectors_of_ranks_need_a_family_that_has_some() -> None:
    refused(
        OptionError,
        "a selector that chooses ranks needs a family that has some",
        network(),
        inputs(),
        budget=BUDGET,
        families=[rf.Interpolative()],
        selector=rf.Lagrangian(),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"an nn\.Module with its Python code · got RecursiveScriptModule"):
        rf.compress(torch.jit.script(network().eval()), [inputs()], budget=BUDGET)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_weight_norm_can_be_copied_after_the_gradients() -> None:
    model = network().eval()
    model[3] = torch.nn.utils.weight_norm(model[3])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model(inputs())
    assert rf.compress(model, [inputs(40)], budget=rf.Budget(params=0.8)).report.after.params > 0


def test_a_tuple_of_two_inputs_is_told_of_dict_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = self.layer(a + b)
            return y

    with pytest.raises(TraceError, match="only the first item is the input: give several inputs as a dict"):
        rf.compress(Two(), [(torch.ones(12, 4), torch.ones(12, 4))], budget=rf.Budget(params=0.5))

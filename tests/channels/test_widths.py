"""How many units of each group stay, by each selector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.channels.elimination import RemovalCurve
from rankfold.channels.stacks import Widths, stacks_of
from rankfold.channels.widths import SIZES, WidthSelector
from rankfold.cost.counted import count
from rankfold.errors import BudgetError, OptionError
from rankfold.plan import Plan
from rankfold.sites.site import Sites

SELECTORS = [*SIZES.values(), rf.InterpolativeGreedy(), rf.RemovalGreedy(relative=0.8)]
X = torch.zeros(2, 6)


def _chain() -> nn.Sequential:
    """Two like blocks and a different layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 12), nn.Linear(12, 4))


def _curves(model: nn.Module, sites: Sites, slopes: list[float]) -> list[RemovalCurve]:
    """Errors that grow with the square of what is gone, and remainders that fall off."""
    curves = []
    for group, slope in zip(rf.find_channels(model, sites), slopes, strict=True):
        errors = slope * torch.arange(group.units + 1, dtype=torch.float64).square()
        lengths = torch.linspace(1, 0.01 / slope, group.units, dtype=torch.float64)
        order = torch.arange(group.units).flip(0)
        curves.append(RemovalCurve(group, order, errors, errors, remainders=lengths))
    return curves


def _widths(bounds: dict[str, int], slopes: list[float], *, multiple_of: int = 1, uniform: bool = False) -> Widths:
    model = _chain()
    sites = rf.find_sites(model, X)
    curves = _curves(model, sites, slopes)
    stacks = stacks_of([curve.group for curve in curves], multiple_of=multiple_of, uniform=uniform)
    return Widths(model, curves, sites, bounds, stacks)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_every_selector_meets_the_bounds_and_spends_them(selector: WidthSelector, share: float) -> None:
    whole = count(_chain(), X).params
    widths = _widths({"params": int(whole * share)}, [1.0, 0.1, 0.5])
    selector.select(widths)
    assert widths.cost.params <= int(whole * share)
    assert widths.cost.params >= share * whole - (120 if isinstance(selector, rf.InterpolativeGreedy) else 40)
    a, b, c = widths.left
    assert widths.cost.params == 7 * a + (a + 1) * b + (b + 1) * c + (c + 1) * 4


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_bounds_below_the_smallest_are_refused_with_it(selector: WidthSelector) -> None:
    with pytest.raises(BudgetError, match="the smallest"):
        selector.select(_widths({"params": 5}, [1.0, 0.1, 0.5]))


def test_the_cheapest_group_loses_most() -> None:
    widths = _widths({"params": 400}, [1.0, 0.001, 1.0])
    rf.RemovalGreedy().select(widths)
    # 7a + (a + 1)b + (b + 1)c + 4(c + 1) ≤ 400 at a = 20, c = 12: b = 5 gives 369, and 6 would give 402.
    assert widths.left == [20, 5, 12]


def test_half_way_is_between_the_ends() -> None:
    ends = []
    for evenness in (0.0, 0.5, 1.0):
        widths = _widths({"params": 400}, [1.0, 0.01, 1.0])
        rf.RemovalGreedy(evenness=evenness).select(widths)
        ends.append(widths.left)
    for low, middle, high in zip(*ends, strict=True):
        assert min(low, high) - 1 <= middle <= max(low, high) + 1


def test_the_seeds_rule_cuts_the_group_of_least_score() -> None:
    """One step by hand: `|R_kk| / |R_00|` over the MACs on both sides."""
    slopes = [1.0, 2.0, 0.5]
    whole = count(_chain(), X).params
    widths = _widths({"params": whole - 1}, slopes)
    scores = []
    for stack, (units, macs) in enumerate([(20, 120 + 400), (20, 400 + 240), (12, 240 + 48)]):
        left = int(0.9 * units)
        lengths = torch.linspace(1, 0.01 / slopes[stack], units)
        scores.append(float(lengths[left] / lengths[0]) / macs)
    rf.InterpolativeGreedy(kappa=0.9).select(widths)
    cut = min(range(3), key=lambda stack: scores[stack])
    whole_sizes = [20, 20, 12]
    assert widths.left == [int(0.9 * n) if i == cut else n for i, n in enumerate(whole_sizes)]


def test_multiples_hold_and_small_groups_stay_whole() -> None:
    widths = _widths({"params": 300}, [1.0, 0.1, 0.5], multiple_of=16)
    assert [stack.allowed for stack in widths.stacks] == [(16, 20), (16, 20), (12,)]


def test_uniform_groups_go_together() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)) for _ in range(3))
            self.head = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            y: torch.Tensor = self.head(x)
            return y

    torch.manual_seed(0)
    model, data = Stack().eval(), [torch.randn(64, 6)]
    for selector in SELECTORS:
        out = rf.compress(
            model,
            data,
            budget=rf.Budget(params=0.6),
            families=[rf.Interpolative(uniform=True)],
            selector=selector,
        )
        kept = {decision.group: len(decision.kept) for decision in out.plan.channels}
        assert len({kept.get(f"blocks.{i}.0", 16) for i in range(3)}) == 1
        assert Plan.from_json(out.plan.to_json()) == out.plan


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"InterpolativeGreedy\.kappa"):
        rf.InterpolativeGreedy(kappa=1.0)
    with pytest.raises(OptionError, match=r"RemovalGreedy\.relative"):
        rf.RemovalGreedy(relative=2)
    with pytest.raises(OptionError, match=r"RemovalGreedy\.evenness"):
        rf.RemovalGreedy(evenness=True)
    with pytest.raises(OptionError, match=r"Interpolative\.uniform"):
        rf.Interpolative(uniform=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a selector that chooses how many channels stay"):
        rf.compress(
            _chain(),
            [X],
            budget=rf.Budget(params=0.5),
            families=[rf.WhitenedSVD(), rf.Interpolative()],
            selector=rf.InterpolativeGreedy(),
        )

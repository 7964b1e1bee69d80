"""Channels, ranks and branches on one state, at one price of cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation import Curves, Option
from rankfold.channels.stacks import Widths
from rankfold.channels.widths import WidthSelector
from rankfold.checks import check_number
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.cost.resources import Cost
from rankfold.registry import register
from rankfold.sites.site import Site

Array: TypeAlias = NDArray[np.float64]

GRID = 32  # numbers of units of a stack that are looked at
SWEEPS = 6  # largest number of rounds over all stacks at one price
ABOVE = 1e3  # the highest price that is looked at, in all errors over the least cost of a channel
LOWEST = 1e-18  # the lowest, in the highest
NEAR = 1.02  # ratio of two prices between which no other is looked at


@dataclass(frozen=True)
class BranchMove:
    """A branch that can go.

    Attributes:
        name: Its name.
        paths: Sites that go with it.
        error: What its loss is predicted to cost, in the unit of the errors of channels.
        beside: Cost of what goes with it beside these sites, at full width: where channels that run through a norm in
            the branch go too, that norm is counted on both sides.
    """

    name: str
    paths: frozenset[str]
    error: float
    beside: Cost


@register("ledger")
@dataclass(frozen=True)
class Ledger(WidthSelector):
    """Weighs channels against ranks on one state: what a layer's rank saves depends on the channels it has left.

    At a price `λ` of cost, the state minimises `Σ_i e_i(o_i) + Σ_g E_g(u_g) + λ C(o, u)`: `e_i(o)` the error of option
    `o` (dense, or a method at a rank) of site i, `E_g(u)` that of `u` units left of group g, and `C` the cost of the
    whole model in shares of its bounds, computed from the state. The cost of an option is bilinear in the input and
    output channels that are left, in every form. Groups are set one after the other, down or up, each to the best
    number of units with the best options of all layers that it touches, until nothing changes. Only a resource whose
    bound would be broken has a price, the least at which all bounds hold. A branch is a move like any other: it goes,
    or comes back, where its error is below the priced cost of its layers on the channels they have left, with their
    best options, and what those lose. The ranks are then chosen anew, from curves of the model that the channels
    leave. `compress` makes such plans by itself: it is no selector to be passed, since it is neither of channels nor
    of ranks alone.

    Attributes:
        scale: Factor on the errors of channels, where they are measured to cost more, or less, than predicted.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        law = "a number above 0"
        check_number("Ledger.scale", self.scale, law=law, cure="try 1.0", high=math.inf, open_low=True)

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Selector.reads`."""
        return ("ranks",)

    def shrink(self, widths: Widths) -> None:
        """See `WidthSelector.shrink`."""
        if widths.ranks is None:
            raise TypeError("the widths lack the curves that the selector reads")
        state = self._settled(widths, ())
        for stack, left in enumerate(state.left):
            widths.set(stack, left)

    def without(self, widths: Widths, moves: Sequence[BranchMove]) -> tuple[str, ...]:
        """Names of the branches that go, the first that would at rising prices first.

        Args:
            widths: The model, its bounds, and its curves.
            moves: The branches that can go.

        Raises:
            BudgetError: The bounds do not hold even without all branches, at the least ranks and widths.
        """
        state = self._settled(widths, moves)
        gone = [move for move, out in zip(moves, state.out, strict=True) if out]
        return tuple(move.name for move in sorted(gone, key=state.ratio))

    def _settled(self, widths: Widths, moves: Sequence[BranchMove]) -> _State:
        """The state at the least price at which all bounds hold."""
        state = _State(widths, widths.ranks, self.scale, moves)
        highest = state.highest_price()
        if bool((state.settle(np.full(len(widths.bounds), highest)) > 0).any()):
            for stack in range(len(widths.stacks)):
                widths.set(stack, widths.stacks[stack].allowed[0])
            raise widths.impossible()
        priced = np.zeros(len(widths.bounds))  # 1 for a resource that has a price
        excess = state.settle(np.zeros_like(priced))
        while bool((excess > 0).any()):
            priced[np.where(priced > 0, -np.inf, excess).argmax()] = 1.0
            low, high = highest * LOWEST, highest
            while high / low > NEAR:
                middle = math.sqrt(low * high)
                held = bool((state.settle(middle * priced)[priced > 0] <= 0).all())
                low, high = (low, middle) if held else (middle, high)
            excess = state.settle(high * priced)
        return state


class _Layer:
    """Options of a site: errors, and the coefficients of their costs.

    The cost of an option with shares `a` of the inputs and `b` of the outputs left is `α a + β b + γ + δ a b`, which
    the costs at once and twice the channels give.
    """

    def __init__(self, site: Site, options: Sequence[Option], weights: dict[str, float]) -> None:
        self.inputs, self.outputs = site.geometry.inputs, site.geometry.outputs
        self.errors = np.array([option.error for option in options])
        depthwise = site.geometry.groups > 1

        def priced(option: Option, inputs: int, outputs: int) -> Array:
            geometry = site.geometry
            if depthwise:
                geometry = replace(
                    geometry,
                    inputs=geometry.inputs * inputs,
                    outputs=geometry.outputs * inputs,
                    groups=geometry.groups * inputs,
                )
            else:
                geometry = replace(geometry, inputs=geometry.inputs * inputs, outputs=geometry.outputs * outputs)
            own = replace(site, geometry=geometry)
            cost = dense_cost(own) if option.method is None else site_cost(own, option.method.form, option.rank or 0)
            return _weighted(cost, weights)

        rows = []
        for option in options:
            one, wide, high, both = (priced(option, *sizes) for sizes in ((1, 1), (2, 1), (1, 2), (2, 2)))
            product = np.zeros_like(one) if depthwise else both - wide - high + one
            first = wide - one - product
            second = np.zeros_like(one) if depthwise else high - one - product
            rows.append((first, second, one - first - second - product, product))
        self.coefficients = np.array(rows).transpose(1, 2, 0)  # 4 × resources × options

    def costs(self, inputs: Array, outputs: Array) -> Array:
        """Costs with some shares of the channels left, shape (resources, options, shares)."""
        alpha, beta, gamma, delta = (part[..., None] for part in self.coefficients)
        result: Array = alpha * inputs + beta * outputs + gamma + delta * inputs * outputs
        return result

    def best(self, prices: Array, inputs: Array, outputs: Array) -> tuple[Array, Array]:
        """Error plus priced cost of the best option, and its cost in each resource, for each pair of shares."""
        costs = self.costs(inputs, outputs)
        totals = self.errors[:, None] + np.tensordot(prices, costs, 1)
        chosen = totals.argmin(0)
        columns = np.arange(len(inputs))
        return totals[chosen, columns], costs[:, chosen, columns]


def _weighted(cost: Cost, weights: dict[str, float]) -> Array:
    """A cost in units of its own, resource by resource."""
    amounts = cost.amounts()
    return np.array([amounts[name] * weight for name, weight in weights.items()])


class _State:
    """Units left of every stack, branches that are gone, and the best options of all layers at a price."""

    def __init__(self, widths: Widths, ranks: Curves | None, scale: float, moves: Sequence[BranchMove]) -> None:
        self._widths = widths
        unit = 1.0 if ranks is None else ranks.unit
        weights = {name: 1 / max(bound, 1) for name, bound in widths.bounds.items()}
        by_site: dict[str, list[Option]] = {}
        for curve in ranks or ():
            own = by_site.setdefault(curve.site.path, [])
            own += [Option(curve.method, *each) for each in zip(curve.ranks, curve.costs, curve.errors, strict=True)]
        self._layers = {
            site.path: _Layer(site, [Option(None, None, dense_cost(site), 0.0), *by_site.get(site.path, [])], weights)
            for site in widths.sites
        }
        layers = sum((dense_cost(site) for site in widths.sites), Cost())
        self._fixed = _weighted(widths.sites.cost - layers, weights)
        self._touched = [widths.touched(s) for s in range(len(widths.stacks))]
        self._carried: list[Array] = [
            np.array([weight * widths.carried(s, name) for name, weight in weights.items()]) for s in self._stacks
        ]
        self._errors = [
            np.sum([curve.errors.numpy() for curve in widths.groups(s)], axis=0) * scale / unit for s in self._stacks
        ]
        self._grid = []
        for stack in widths.stacks:
            allowed = np.array(stack.allowed)
            places = np.unique(np.linspace(0, len(allowed) - 1, GRID).round().astype(int))
            self._grid.append(allowed[places])
        self.left = [widths.units(s) for s in self._stacks]
        self._gone = {path: np.zeros(2) for path in self._layers}  # input and output channels gone
        self._least = min(weights.values())  # cost of one parameter, MAC or byte
        self._moves = moves
        self._losses = [move.error / unit for move in moves]
        self._beside = [_weighted(move.beside, weights) for move in moves]
        self.out = [False] * len(moves)
        self._inner = [  # stacks that touch no layer outside a branch
            [s for s in self._stacks if self._touched[s] and move.paths.issuperset(self._touched[s])] for move in moves
        ]

    @property
    def _stacks(self) -> range:
        return range(len(self._widths.stacks))

    def highest_price(self) -> float:
        """A price at which everything goes that can: far above all errors over all savings."""
        errors = sum(float(layer.errors.max()) for layer in self._layers.values())
        errors += sum(float(own[-1]) for own in self._errors) + sum(e for e in self._losses if math.isfinite(e))
        return ABOVE * (errors or 1.0) / self._least

    def settle(self, prices: Array) -> Array:
        """Set every stack to its best size at some prices, again and again.

        Returns:
            By how much each bound is then broken, in shares of it; 0 and less where it holds.
        """
        for stack in self._stacks:
            self._set(stack, self._widths.units(stack))
        self.out = [False] * len(self._moves)
        for _ in range(SWEEPS):
            before = list(self.left), list(self.out)
            for stack in self._stacks:
                self._set(stack, self._best(stack, prices))
            for move in range(len(self._moves)):
                self.out[move] = self._goes(move, prices)
            if (self.left, self.out) == before:
                break
        total = self._fixed - 1.0
        gone = self._dead()
        for path in self._layers:
            if path not in gone:
                total = total + self._now(path, prices)[1]
        for stack, left in enumerate(self.left):
            if not self._idle(stack, gone):
                total = total - self._carried[stack][:, self._widths.units(stack) - left]
        for move, out in enumerate(self.out):
            total = total - self._beside_now(move) * out
        return total

    def ratio(self, move: BranchMove) -> float:
        """Error of a branch over what it saves of the whole model, all else untouched."""
        number = self._moves.index(move)
        whole = np.ones(1)
        saved = self._beside[number] + sum(self._layers[p].costs(whole, whole)[:, 0, 0] for p in self._inside(move))
        return self._losses[number] / float(saved.sum())

    def _inside(self, move: BranchMove) -> list[str]:
        """Layers that go with a branch, in the order of the sites: sums in the order of a set are not reproducible."""
        return [path for path in self._layers if path in move.paths]

    def _dead(self, but: int | None = None) -> set[str]:
        """Layers that are gone with a branch, one branch left out of account."""
        gone = (move.paths for i, move in enumerate(self._moves) if self.out[i] and i != but)
        return set().union(*gone)

    def _idle(self, stack: int, gone: set[str]) -> bool:
        """Whether a stack touches no layer that is left."""
        return bool(gone) and gone.issuperset(self._touched[stack])

    def _now(self, path: str, prices: Array) -> tuple[float, Array]:
        """Error plus priced cost of the best option of a layer as it is, and its cost."""
        total, cost = self._layers[path].best(prices, *(np.array([share]) for share in self._shares(path)))
        return float(total[0]), cost[:, 0]

    def _beside_now(self, move: int) -> Array:
        """What goes with a branch beside its layers, but for what has gone with branches inside it."""
        paths = self._moves[move].paths
        own = self._beside[move]
        for other, inner in enumerate(self._moves):
            if self.out[other] and inner.paths < paths:
                own = own - self._beside[other]
        return own

    def _goes(self, move: int, prices: Array) -> bool:
        """Whether a branch is better gone, all else as it is; one inside another that is gone has nothing to save."""
        others = self._dead(but=move)
        if self._moves[move].paths <= others:
            return False
        stays = float(prices @ self._beside_now(move))
        stays += sum(self._now(path, prices)[0] for path in self._inside(self._moves[move]) if path not in others)
        for stack in self._inner[move]:
            if not self._idle(stack, others):
                fewer = self._widths.units(stack) - self.left[stack]
                stays += float(self._errors[stack][fewer] - prices @ self._carried[stack][:, fewer])
        return self._losses[move] < stays

    def _shares(self, path: str) -> tuple[float, float]:
        layer, gone = self._layers[path], self._gone[path]
        return 1 - gone[0] / layer.inputs, 1 - gone[1] / layer.outputs

    def _best(self, stack: int, prices: Array) -> int:
        """The number of units at which a stack costs least, all else as it is."""
        units = self._widths.units(stack)
        gone = self._dead()
        if self._idle(stack, gone):
            return units
        grid = self._grid[stack]
        total: Array = self._errors[stack][units - grid] - prices @ self._carried[stack][:, units - grid]
        now = units - self.left[stack]
        for path, (inputs, outputs) in self._touched[stack].items():
            if path in gone:
                continue
            layer, own = self._layers[path], self._gone[path]
            a = 1 - (own[0] - inputs[now] + inputs[units - grid]) / layer.inputs
            b = 1 - (own[1] - outputs[now] + outputs[units - grid]) / layer.outputs
            total = total + layer.best(prices, a, b)[0]
        return int(grid[total.argmin()])

    def _set(self, stack: int, left: int) -> None:
        units = self._widths.units(stack)
        before, after = units - self.left[stack], units - left
        for path, (inputs, outputs) in self._touched[stack].items():
            self._gone[path] += (inputs[after] - inputs[before], outputs[after] - outputs[before])
        self.left[stack] = left

"""Solving one site of a lockstep pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.decompositions import factorise
from rankfold.errors import allocating
from rankfold.graph.walk import Arrival
from rankfold.install.fill import unrepaired
from rankfold.install.tied import fill_head
from rankfold.layers import Adapter, Geometry, adapter_for, build_shell, fill_shell, form_of, tensor
from rankfold.layers.tied import build_head, table_of
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.plan.repair import Lockstep
from rankfold.repair.fitted import Fitted
from rankfold.repair.gather import Share
from rankfold.repair.head import gathered, repaired_map, root_of
from rankfold.repair.moments import SplitMoments
from rankfold.repair.solve import as_moments, best_bias, mean_target, ridge
from rankfold.repair.targets import Targets
from rankfold.sites.site import Site
from rankfold.statistics import Statistics
from rankfold.statistics.size import size_of

DOUBT = 0.16  # share of the error by which a repair must lower it with one held-out sample; see `doubt`


@dataclass(eq=False)
class Solved:
    """A site's new layer.

    Attributes:
        layer: Module that takes the site's place; the original layer itself where nothing changes.
        buffers: Running means of batch norms that take up a bias, by name.
        errors: Relative held-out error without repair and of `layer`; None where nothing was solved.
        repaired: True if `layer` is the repaired one.
    """

    layer: nn.Module
    buffers: dict[str, Tensor] = field(default_factory=dict)
    errors: tuple[float, float] | None = None
    repaired: bool = False


def doubt(samples: int) -> float:
    """Share by which a repair must lower the held-out error to be used: `0.16/√n` for n held-out samples.

    With ten samples a gain of 5 % is as likely chance. A repair that gains only a percent on held-out samples, as at
    the last layers of MobileNetV1 with 50 photographs, loses decisions; one that is worthwhile gains far more.

    Args:
        samples: Number `n` of held-out samples; 0 where the error is that of fitted samples, which the report notes.
    """
    return DOUBT / math.sqrt(samples) if samples else 0.0


Recall: TypeAlias = Callable[[str, Callable[[], Solved]], Solved]  # (path, its solver) → the solution


def always_solve(path: str, solve: Callable[[], Solved]) -> Solved:
    """The recall of a pass that keeps nothing."""
    return solve()


class SiteSolver:
    """Solver of one site after another, with the data that all of them need.

    Args:
        modules: The original's modules by path.
        plan: Plan with the decision of each site.
        options: The repair's options.
        stats: Statistics of the original.
        share: The micro-batches walked here.
        kept: Channels of each site that stay, by path; `modules` are then narrowed. None cuts nothing.
        alone: Numbers of rows that a site sees of one sample alone, by path; empty where they are not known.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        plan: Plan,
        options: Lockstep,
        stats: Statistics | None,
        share: Share,
        kept: Mapping[str, Kept] | None = None,
        alone: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self._kept = {} if kept is None else kept
        self._modules, self._plan, self._options, self._stats, self._share = modules, plan, options, stats, share
        self.targets = Targets(modules, options, share, plan.seed, self._kept, {} if alone is None else alone)
        self._turn = 0

    def solve(self, arrival: Arrival) -> Solved:
        """Solve a site: ridge, factorise in the metric of the compressed inputs, judge on held-out samples."""
        path = arrival.call.path
        layer, decision = self._modules[path], self._plan.at(path)
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{path} has no adapter")
        untouched = arrival.inputs.same and (arrival.skip is None or arrival.skip.same)
        cut = self._kept.get(path, Kept()).inputs is not None
        if decision.method is None and not cut and (not self._options.dense or untouched):
            return Solved(layer)
        needs = size_of(Site(path, (), "", adapter.geometry(layer), (), 1), (), repaired=True)
        with allocating(repr(path), "the moments of a layer to be solved", needs=needs.repair):
            seen = self.targets.moments(arrival, layer, adapter)
        norm = None if _has_bias(decision, adapter.geometry(layer)) else arrival.call.norm
        turn, self._turn = self._turn, self._turn + 1
        mine = self._share.world.owns(turn)
        with allocating(repr(path), "solving a layer", needs=needs.working):
            maps = self._maps(arrival, decision, layer, adapter, norm, seen, turn)
            held = bool(seen.held.count)
            solved = self._judged(decision, layer, adapter, norm, *maps, held=held) if mine else None
        return solved if self._share.world.size == 1 and solved else self._given(solved, decision, layer, norm, turn)

    def table(self, path: str, head: str) -> Solved:
        """The shell of a table that is tied to a head, without repair: what is looked up is the same in both networks.

        Args:
            path: Path of the table.
            head: Path of the head.
        """
        layer, decision = self._modules[path], self._plan.at(path)
        adapter = adapter_for(layer)
        if decision.method is None or adapter is None:
            return Solved(layer)
        turn, self._turn = self._turn, self._turn + 1
        shell = self._shell(layer, decision)
        if self._share.world.owns(turn):
            factors, _ = unrepaired(decision, layer, self._stats, head)
            fill_shell(shell, adapter.stored(layer, factors), None)
        self._share.world.broadcast_([*shell.parameters(), *shell.buffers()], turn)
        return Solved(shell)

    def head(self, arrival: Arrival, table: str, shell: nn.Module, *, alone: bool) -> Solved:
        """The head of a table: two layers, of which the second holds the table of the shell.

        Args:
            arrival: State of the walk before the head.
            table: Path of the table.
            shell: The table's new layer.
            alone: True if the head is called once; the map of one that is called more often is not solved anew.
        """
        path, decision = arrival.call.path, self._plan.at(table)
        layer = self._modules[path]
        if decision.method is None:
            return Solved(layer)
        built, weight = build_head(layer, shell), widen(tensor(layer, "weight"))
        metric = self._gradient_gram(path, 0)
        turn, self._turn = self._turn, self._turn + 1
        told = torch.zeros(3, dtype=torch.float64)
        fill_head(built, layer, metric)
        if alone:
            root = root_of(weight.mT @ weight if metric is None else metric.to(weight))
            seen = gathered(arrival, root, lambda *own: self.targets.gather(path, *own))
            self.targets.check_finite(arrival, seen)
            if self._share.world.owns(turn):
                own, errors = repaired_map(layer, table_of(shell), metric, root, seen, self._options)
                helps = errors[1] <= errors[0] * (1 - doubt(self._share.judging if seen.held.count else 0))
                told = torch.tensor([*errors, float(helps)], dtype=torch.float64)
                if helps:
                    with torch.no_grad():
                        tensor(next(built.children()), "weight").copy_(own)
        self._share.world.broadcast_([told, tensor(next(built.children()), "weight")], turn)
        before, after, repaired = told.tolist()
        return Solved(built, {}, (before, after if repaired else before) if alone else None, bool(repaired))

    def _given(
        self, solved: Solved | None, decision: Decision, layer: nn.Module, norm: str | None, turn: int
    ) -> Solved:
        """The solution of the process whose turn it is, in every process.

        Sites are solved one after the other, so sharing them out saves no time; but one solution that is sent to all
        processes has the same bits everywhere, also on unequal machines, and costs less than the sums of the moments.
        """
        told = torch.zeros(3, dtype=torch.float64)
        if solved is None:
            new = copy.deepcopy(layer) if decision.method is None else self._shell(layer, decision)
        else:
            new = solved.layer
            if solved.errors is not None:
                told = torch.tensor([*solved.errors, float(solved.repaired)], dtype=torch.float64)
        buffers = {} if norm is None else {norm: self._buffer(norm).clone()}
        if solved is not None:
            buffers.update(solved.buffers)
        self._share.world.broadcast_([told, *new.parameters(), *new.buffers(), *buffers.values()], turn)
        before, after, repaired = told.tolist()
        return Solved(new, buffers if repaired else {}, (before, after), bool(repaired))

    def _maps(
        self,
        arrival: Arrival,
        decision: Decision,
        layer: nn.Module,
        adapter: Adapter,
        norm: str | None,
        seen: SplitMoments,
        turn: int,
    ) -> tuple[list[Fitted], list[float]]:
        """The maps that may take a site's place, the unrepaired one first, with their errors on held-out samples."""
        mine = self._share.world.owns(turn)

        def repaired(moments: SplitMoments) -> Fitted:
            return self._repaired(decision, layer, adapter, moments, absorbs=norm is not None)

        maps = [self._unrepaired(decision, layer, adapter), repaired(seen)] if mine else []
        past = self.targets.past(arrival, layer, adapter)
        if past is None:
            judge = seen.held if seen.held.count else seen.fit
            energy = float(judge.yy.sum() / max(judge.count, 1)) or 1.0
            return maps, [each.error(judge) / energy for each in maps]
        affine = [self._told(maps, number, seen, turn) for number in range(2)]
        for number in range(2, 2 + self._options.activation):
            moments = past.moments(seen, affine[-1])
            maps += [repaired(moments)] if mine else []
            affine.append(self._told(maps, number, seen, turn))
        return maps, past.errors(seen, affine)

    def _told(self, maps: list[Fitted], number: int, seen: SplitMoments, turn: int) -> tuple[Tensor, Tensor]:
        """A map of the process whose turn it is, in every process."""
        yx = seen.fit.yx
        affine = maps[number].affine() if maps else (torch.zeros_like(yx), yx.new_zeros(len(yx), 1, yx.shape[1]))
        weight, bias = (each.contiguous() for each in affine)
        self._share.world.broadcast_([weight, bias], turn)
        return weight, bias

    def _judged(
        self,
        decision: Decision,
        layer: nn.Module,
        adapter: Adapter,
        norm: str | None,
        maps: list[Fitted],
        errors: list[float],
        *,
        held: bool,
    ) -> Solved:
        """The best repaired map, unless it is not clearly better than the unrepaired one."""
        plain, before = maps[0], errors[0]
        after = min(errors[1:])
        if not after <= before * (1 - doubt(self._share.judging if held else 0)):
            return Solved(self._build(layer, adapter, decision, plain), {}, (before, before))
        best = maps[1 + errors[1:].index(after)]
        buffers = {}
        if norm is not None and best.bias is not None:
            mean = self._buffer(norm)
            # (x + b − m)·s = (x − (m − b))·s: the norm's running mean takes the bias the layer does not have.
            buffers[norm] = (widen(mean) - best.bias).to(mean.dtype)
        return Solved(self._build(layer, adapter, decision, best), buffers, (before, after), repaired=True)

    def _repaired(
        self, decision: Decision, layer: nn.Module, adapter: Adapter, seen: SplitMoments, *, absorbs: bool
    ) -> Fitted:
        bias = _has_bias(decision, adapter.geometry(layer)) or absorbs
        weights, factors, shifts = [], [], []
        ridge_least, anchor = self._options.ridge, self._options.anchor
        originals, own = widen(adapter.canonical(layer)), adapter.bias(layer)
        shares = [None] * len(originals) if own is None else widen(own).chunk(len(originals))
        for group, (original, share) in enumerate(zip(originals, shares, strict=True)):
            dense = original.flatten(1)
            target, _ = ridge(seen, group, dense, bias=bias, strength=ridge_least, anchor=anchor)
            if decision.method is not None and decision.rank is not None:
                moments = as_moments(seen, group, bias=bias, gradient_gram=self._gradient_gram(decision.site, group))
                factors.append(factorise(decision.method, target.reshape(original.shape), decision.rank, moments))
                target = factors[-1].reconstruct().flatten(1)
            weights.append(target)
            mean = mean_target(seen.fit, group, dense, share, anchor)
            shifts.append(best_bias(seen.fit, group, target, mean))
        return Fitted(weights, factors, torch.cat(shifts) if bias else None)

    def _unrepaired(self, decision: Decision, layer: nn.Module, adapter: Adapter) -> Fitted:
        """The map that `apply` without repair would install at a site."""
        factors, bias = unrepaired(decision, layer, self._stats)
        weights = [each.reconstruct().flatten(1) for each in factors]
        if not factors:
            weights = [group.flatten(1) for group in widen(adapter.canonical(layer))]
        return Fitted(weights, factors, bias)

    def _gradient_gram(self, path: str, group: int) -> Tensor | None:
        """The output weighting of a site, where gradients were collected."""
        return None if self._stats is None else self._stats.gradient_gram(path, group)

    def _build(self, layer: nn.Module, adapter: Adapter, decision: Decision, chosen: Fitted) -> nn.Module:
        bias = chosen.bias if _has_bias(decision, adapter.geometry(layer)) else None
        if decision.method is None or decision.rank is None:
            new = copy.deepcopy(layer)
            with torch.no_grad():
                adapter.rewrite(new, torch.stack(chosen.weights))
                if bias is not None:
                    tensor(new, "bias").copy_(bias)
            return new
        shell = self._shell(layer, decision)
        fill_shell(shell, adapter.stored(layer, chosen.factors), bias)
        return shell

    def _shell(self, layer: nn.Module, decision: Decision) -> nn.Module:
        """The shell of a decision's form and rank, still empty."""
        adapter = adapter_for(layer)
        if adapter is None or decision.method is None or decision.rank is None:
            raise TypeError(f"{decision.site} was not checked")
        weight = adapter.canonical(layer)
        return build_shell(
            adapter.geometry(layer), decision.method.form, decision.rank, device=weight.device, dtype=weight.dtype
        )

    def _buffer(self, name: str) -> Tensor:
        """A buffer of the original."""
        module, _, buffer = name.rpartition(".")
        return tensor(self._modules[module], buffer)


def _has_bias(decision: Decision, geometry: Geometry) -> bool:
    """Whether what replaces a layer has a bias."""
    return geometry.bias or (decision.method is not None and form_of(decision.method.form).adds_bias)

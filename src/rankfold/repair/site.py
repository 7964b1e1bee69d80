"""Solving one site of a lockstep pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.decompositions import Moments, factorise
from rankfold.errors import NumericsError, allocating
from rankfold.factors import Factors
from rankfold.graph.lockstep import Arrival
from rankfold.graph.regions import channel_scale
from rankfold.graph.sites import Site
from rankfold.layers import Adapter, adapter_for, build_shell, fill_shell, tensor
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.repair.moments import PairMoments
from rankfold.repair.options import Lockstep
from rankfold.repair.solve import as_moments, best_bias, ridge
from rankfold.repair.widened import channel_axis, narrowed
from rankfold.statistics import Statistics
from rankfold.statistics.collect import chunks
from rankfold.statistics.distributed import ALONE, World
from rankfold.statistics.draws import enough_positions, generator
from rankfold.statistics.size import size_of

SMALL_SCALE = 0.05  # of the median: channels scaled by less cannot take up the skip branch's error


@dataclass(eq=False)
class Solved:
    """A site's new layer.

    Attributes:
        layer: What takes the site's place; the original layer itself where nothing changes.
        buffers: Running means of batch norms that take up a bias, by name.
        errors: Relative held-out error without repair and of `layer`; None where nothing was solved.
        repaired: Whether `layer` is the repaired one.
    """

    layer: nn.Module
    buffers: dict[str, Tensor] = field(default_factory=dict)
    errors: tuple[float, float] | None = None
    repaired: bool = False


Recall: TypeAlias = Callable[[str, Callable[[], Solved]], Solved]  # (path, how to solve it) → its solution


def always_solve(path: str, solve: Callable[[], Solved]) -> Solved:
    """The recall of a pass that keeps nothing."""
    return solve()


@dataclass(eq=False)
class _Candidate:
    """A map for every group of a site: its factors, or its dense weight, and a bias over all groups or None."""

    weights: list[Tensor]
    factors: list[Factors]
    bias: Tensor | None

    def error(self, moments: PairMoments) -> float:
        """Mean squared error over all groups."""
        rows = self.weights[0].shape[0]
        total = 0.0
        for group, weight in enumerate(self.weights):
            bias = None if self.bias is None else self.bias[group * rows : (group + 1) * rows]
            total += moments.error(group, weight, bias)
        return total


@dataclass(eq=False)
class Share:
    """What one process walks of the calibration set.

    Attributes:
        held: For each of its micro-batches, which samples are held out.
        numbers: For each of them, its number among those of all processes.
        starts: For each of them, the place of its first sample in the whole set.
        samples: How many samples the positions are drawn for: all of all processes, or more where these are a part.
        world: The processes.
    """

    held: list[Tensor]
    numbers: list[int]
    starts: list[int]
    samples: int
    world: World = ALONE


class SiteSolver:
    """Solves one site after another; holds what all of them need.

    Args:
        modules: The original's modules by path.
        plan: What becomes of each site.
        options: The repair's options.
        stats: Statistics of the original.
        share: The micro-batches walked here.
        kept: What stays of each site's channels, by path; `modules` are then narrowed. None cuts nothing.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        plan: Plan,
        options: Lockstep,
        stats: Statistics | None,
        share: Share,
        kept: Mapping[str, Kept] | None = None,
    ) -> None:
        self._kept = {} if kept is None else kept
        self._modules, self._plan, self._options, self._stats, self._share = modules, plan, options, stats, share
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
            fit, held = self._moments(arrival, layer, adapter)
        norm = None if adapter.geometry(layer).bias else arrival.call.norm
        turn, self._turn = self._turn, self._turn + 1
        mine = self._share.world.owns(turn)
        with allocating(repr(path), "solving a layer", needs=needs.working):
            solved = self._solved(decision, layer, adapter, norm, fit, held) if mine else None
        return solved if self._share.world.size == 1 and solved else self._given(solved, decision, layer, norm, turn)

    def _given(
        self, solved: Solved | None, decision: Decision, layer: nn.Module, norm: str | None, turn: int
    ) -> Solved:
        """What the process whose turn it is has solved, in every process.

        Sites are solved one after the other, so sharing them out saves no time; but one solve that all are given is
        the same bits everywhere, also on unequal machines, and costs less than the sums of the moments did.
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

    def _solved(
        self,
        decision: Decision,
        layer: nn.Module,
        adapter: Adapter,
        norm: str | None,
        fit: PairMoments,
        held: PairMoments,
    ) -> Solved:
        repaired = self._repaired(decision, layer, adapter, fit, absorbs=norm is not None)
        plain = self._unrepaired(decision, layer, adapter)
        judge = held if held.count else fit
        energy = float(judge.yy.sum() / max(judge.count, 1)) or 1.0
        errors = plain.error(judge) / energy, repaired.error(judge) / energy
        if errors[1] > errors[0]:
            return Solved(self._build(layer, adapter, decision, plain), {}, (errors[0], errors[0]))
        buffers = {}
        if norm is not None and repaired.bias is not None:
            mean = self._buffer(norm)
            # (x + b − m)·s = (x − (m − b))·s: the norm's running mean takes the bias the layer does not have.
            buffers[norm] = (widen(mean) - repaired.bias).to(mean.dtype)
        return Solved(self._build(layer, adapter, decision, repaired), buffers, errors, repaired=True)

    def _repaired(
        self, decision: Decision, layer: nn.Module, adapter: Adapter, fit: PairMoments, *, absorbs: bool
    ) -> _Candidate:
        bias = adapter.geometry(layer).bias or absorbs
        weights, factors, shifts = [], [], []
        for group, original in enumerate(widen(adapter.canonical(layer))):
            target = ridge(fit, group, original.flatten(1), bias=bias, strength=self._options.ridge)
            if decision.method is not None and decision.rank is not None:
                moments = as_moments(fit, group, bias=bias, gradient_gram=self._gradient_gram(decision.site, group))
                factors.append(factorise(decision.method, target.reshape(original.shape), decision.rank, moments))
                target = factors[-1].reconstruct().flatten(1)
            weights.append(target)
            shifts.append(best_bias(fit, group, target))
        return _Candidate(weights, factors, torch.cat(shifts) if bias else None)

    def _unrepaired(self, decision: Decision, layer: nn.Module, adapter: Adapter) -> _Candidate:
        """What `apply` without repair would put here."""
        geometry = adapter.geometry(layer)
        weights, factors, shifts = [], [], []
        for group, original in enumerate(widen(adapter.canonical(layer))):
            flat = original.flatten(1)
            if decision.method is not None and decision.rank is not None:
                moments = Moments(bias=geometry.bias)
                if self._stats is not None:
                    moments = self._stats.moments(Site(decision.site, (), "", geometry, (), 1), group)
                factors.append(factorise(decision.method, original, decision.rank, moments))
                approximate = factors[-1].reconstruct().flatten(1)
                if moments.mean is not None:
                    shifts.append((flat - approximate) @ moments.mean.to(flat))
                flat = approximate
            weights.append(flat)
        bias = adapter.bias(layer)
        wide = None if bias is None else widen(bias)
        if wide is not None and shifts:
            wide = wide + torch.cat(shifts)
        return _Candidate(weights, factors, wide)

    def _gradient_gram(self, path: str, group: int) -> Tensor | None:
        """The output weighting of a site, where gradients were collected."""
        return None if self._stats is None else self._stats.gradient_gram(path, group)

    def _moments(self, arrival: Arrival, layer: nn.Module, adapter: Adapter) -> tuple[PairMoments, PairMoments]:
        """Moments of (x', target) over fitted and held-out samples, at positions drawn by the seed."""
        geometry = adapter.geometry(layer)
        first: Tensor = arrival.inputs.compressed[0]
        kept, axis = self._kept.get(arrival.call.path, Kept()), channel_axis(layer)
        shape = (geometry.groups, geometry.features, geometry.canonical_shape[0])
        fit, held = (PairMoments.zeros(*shape, first.device) for _ in range(2))
        scale = self._inverse_scale(arrival)
        for i, (inputs, target) in enumerate(zip(arrival.inputs.compressed, arrival.outputs, strict=True)):
            positions = self._positions(adapter, layer, inputs, self._share.numbers[i])
            mask = self._share.held[i].to(inputs.device)
            if inputs.shape[0] != len(mask) or not _is_batched(adapter, layer, inputs):  # no sample can be told apart
                mask = torch.zeros(inputs.shape[0], dtype=torch.bool, device=inputs.device)
            read = [target]
            if scale is not None and arrival.skip is not None:
                read += [arrival.skip.original[i], arrival.skip.compressed[i], scale.expand(target.shape)]
            inputs, read = narrowed(inputs, axis, kept.inputs), [narrowed(each, axis, kept.outputs) for each in read]
            for samples, patches, (wanted, *skip) in chunks(adapter, layer, inputs, read, positions):
                if skip:
                    original, compressed, factor = skip
                    wanted = wanted + (original - compressed) * factor
                for moments, chosen in ((fit, ~mask[samples]), (held, mask[samples])):
                    if bool(chosen.any()):
                        moments.update(_of_samples(patches, chosen), _of_samples(wanted, chosen))
        fit.sum_over(self._share.world)
        held.sum_over(self._share.world)
        for moments, part in ((fit, "fitted"), (held, "held-out")):
            if not bool(torch.isfinite(moments.xx).all() and torch.isfinite(moments.yx).all()):
                raise NumericsError(
                    repr(arrival.call.path),
                    law="every activation of both networks is finite",
                    got=f"NaN or infinity in {_not_finite(arrival, part, self._share.starts)}",
                    cure="look at that sample, or exclude the layers before this one",
                )
        return fit, held

    def _positions(self, adapter: Adapter, layer: nn.Module, inputs: Tensor, number: int) -> Tensor | None:
        size, _ = adapter.sample_size(layer, inputs)
        geometry = adapter.geometry(layer)
        available = prod(geometry.output_size(size)) if size else inputs.shape[1:-1].numel()
        wanted = enough_positions(geometry.features, self._options.samples_per_feature, self._share.samples)
        if available <= wanted:
            return None
        return torch.randperm(available, generator=generator(self._plan.seed, number))[:wanted].sort().values

    def _inverse_scale(self, arrival: Arrival) -> Tensor | None:
        """`1/a` of the steps to the residual `add`; None where no error of a skip branch is to be taken up."""
        if not self._options.absorb_skip or arrival.skip is None or arrival.skip.same:
            return None
        output: Tensor = arrival.outputs[0]
        factor = channel_scale(arrival.call, output.shape, arrival.tensor)
        if factor is None:
            return output.new_ones(())
        size = factor.abs()
        return torch.where(size > SMALL_SCALE * size.median(), 1 / factor, 0.0).to(output.dtype)

    def _build(self, layer: nn.Module, adapter: Adapter, decision: Decision, chosen: _Candidate) -> nn.Module:
        weight, has_bias = adapter.canonical(layer), adapter.geometry(layer).bias
        bias = chosen.bias if has_bias else None
        if decision.method is None or decision.rank is None:
            new = copy.deepcopy(layer)
            with torch.no_grad():
                adapter.canonical(new).copy_(torch.stack(chosen.weights).reshape(weight.shape))
                if bias is not None:
                    tensor(new, "bias").copy_(bias)
            return new
        shell = self._shell(layer, decision)
        fill_shell(shell, chosen.factors, bias)
        return shell

    def _shell(self, layer: nn.Module, decision: Decision) -> nn.Sequential:
        """The shell a decision asks for, still empty."""
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


def _is_batched(adapter: Adapter, layer: nn.Module, inputs: Tensor) -> bool:
    """Whether a layer's input has an axis for samples."""
    axes = len(adapter.geometry(layer).kernel)
    return inputs.ndim == axes + 2 if axes else inputs.ndim >= 2


def _of_samples(rows: Tensor, chosen: Tensor) -> Tensor:
    """Those rows of (groups, samples·positions, …) that are of some samples."""
    if bool(chosen.all()):
        return rows
    return torch.unflatten(rows, 1, (len(chosen), -1))[:, chosen].flatten(1, 2)


def _not_finite(arrival: Arrival, part: str, starts: Sequence[int]) -> str:
    """The first sample, from 1 in the order of the data, with an activation that is not finite."""
    for start, inputs, target in zip(starts, arrival.inputs.compressed, arrival.outputs, strict=True):
        for row in range(min(len(inputs), len(target))):
            if not bool(torch.isfinite(inputs[row]).all() and torch.isfinite(target[row]).all()):
                return f"sample {start + row + 1} of the calibration data"
    return f"the sums over the {part} samples"

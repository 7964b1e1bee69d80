"""Lockstep repair: every site is re-solved on what the compressed network feeds it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from rankfold.decompositions import factorise
from rankfold.errors import OptionError, TraceError
from rankfold.factors import Factors
from rankfold.graph.lockstep import Arrival, Pair, Walk, micro_batches
from rankfold.graph.regions import channel_scale, find_calls
from rankfold.graph.sites import Sites
from rankfold.graph.trace import Batch, device_of, evaluating, to_device
from rankfold.layers import Adapter, adapter_for, build_shell, fill_shell, tensor
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.progress import Progress, silent
from rankfold.registry import register
from rankfold.repair.moments import PairMoments
from rankfold.repair.solve import as_moments, best_bias, ridge
from rankfold.statistics import Statistics
from rankfold.surgery import filler


@register("lockstep")
@dataclass(frozen=True)
class Lockstep:
    """Walk original and compressed network together and re-solve every site in closed form.

    At a site with original output `y` and compressed input `x'`: `W* = argmin E‖y − Wx' − b‖² + λ‖W − W₀‖²`, then the
    plan's method factorises `W*` in the metric of `x'`, and the bias makes the mean output right. A dense site is
    re-solved too. Where the output reaches a residual `add` through per-channel factors `a` only, the target is
    `y + (skip − skip')/a`, so that the site also takes up the error its skip branch carries. A layer without a bias
    gets none: a batch norm right behind it takes the shift into its running mean, otherwise raw moments are used.

    Attributes:
        ridge: `λ` relative to the mean input energy.
        absorb_skip: Whether targets include the skip branch's error.
        dense: Whether sites that stay dense are re-solved.
        samples_per_feature: Positions looked at, as a multiple of a layer's patch length (at least 16,384).
        batch: Samples in a micro-batch.
    """

    ridge: float = 1e-3
    absorb_skip: bool = True
    dense: bool = True
    samples_per_feature: int = 48
    batch: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.ridge <= 1:
            raise OptionError("Lockstep.ridge", law="in (0, 1]", got=repr(self.ridge), cure="try 1e-3")


@dataclass(eq=False)
class Repaired:
    """What a lockstep pass gives.

    Attributes:
        layers: New layer of every site, by path.
        buffers: Changed running means of batch norms, by name.
        outputs: Outputs of both networks, one list entry a micro-batch.
        errors: For every site the relative held-out error before and after repair.
        kept: Sites where the repair made the held-out error larger and was not used.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    outputs: Pair | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def lockstep(
    model: nn.Module,
    sites: Sites,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    options: Lockstep,
    stats: Statistics | None,
    every: int,
    progress: Progress = silent,
) -> Repaired:
    """One lockstep pass over the whole network.

    Args:
        model: The original; not changed.
        sites: Of the original, with a graph.
        plan: What becomes of each site.
        batches: The calibration set.
        options: The repair's options.
        stats: Statistics of the original, for the unrepaired factors.
        every: One sample in this many is held out.
        progress: Told about every site.

    Returns:
        The new layers and buffers, ready to be installed.
    """
    program = sites.graph.program
    if program is None:
        raise TraceError(
            sites.model,
            law="lockstep repair walks the traced graph",
            got=sites.graph.reason or "no graph",
            cure="pass repair=None",
        )
    device = device_of(model)
    parts = [(to_device(part, device), rows) for part, rows in micro_batches(iter(batches), options.batch)]
    held = [torch.tensor([row % every == every - 1 for row in rows]) for _, rows in parts]
    calls = find_calls(program, sites)
    result = Repaired()
    modules = dict(model.named_modules(remove_duplicate=False))
    with progress("lockstep", len({call.path for call in calls})) as advance, evaluating(model):
        solver = _Solver(modules, plan, options, stats, held, result)

        def solve(arrival: Arrival) -> nn.Module:
            layer = solver(arrival)
            advance()
            return layer

        walk = Walk(program, model, calls, [part for part, _ in parts], solve, result.buffers)
        result.outputs = walk.run()
    return result


class _Solver:
    """Solves one site after another; holds what all of them need."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        plan: Plan,
        options: Lockstep,
        stats: Statistics | None,
        held: list[Tensor],
        result: Repaired,
    ) -> None:
        self.modules, self.plan, self.options, self.stats = modules, plan, options, stats
        self.held, self.result = held, result

    def __call__(self, arrival: Arrival) -> nn.Module:
        """The layer that takes the site's place."""
        path = arrival.call.path
        layer, decision = self.modules[path], self.plan.at(path)
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{path} has no adapter")
        if decision.method is None and (not self.options.dense or self._untouched(arrival)):
            self.result.layers[path] = layer
            return layer
        fit, held = self._moments(arrival, layer, adapter)
        geometry = adapter.geometry(layer)
        absorbs = geometry.bias or arrival.call.norm is not None
        weight = widen(adapter.canonical(layer))
        factors: list[Factors] = []
        dense: list[Tensor] = []
        shifts: list[Tensor] = []
        for group in range(geometry.groups):
            flat = weight[group].flatten(1)
            target = ridge(fit, group, flat, bias=absorbs, strength=self.options.ridge)
            if decision.method is None or decision.rank is None:
                dense.append(target.reshape(weight[group].shape))
            else:
                moments = as_moments(fit, group, bias=absorbs, gradient_gram=self._gradient_gram(path, group))
                factors.append(factorise(decision.method, target.reshape(weight[group].shape), decision.rank, moments))
                target = factors[-1].reconstruct().flatten(1)
            shifts.append(best_bias(fit, group, target))
        bias = torch.cat(shifts) if absorbs else None
        new = self._build(layer, adapter, decision, factors, dense, bias if geometry.bias else None)
        if bias is not None and not geometry.bias and arrival.call.norm is not None:
            self._shift_norm(arrival.call.norm, bias)
        self.result.layers[path] = new
        return new

    def _gradient_gram(self, path: str, group: int) -> Tensor | None:
        """The output weighting of a site, where gradients were collected."""
        own = {} if self.stats is None else self.stats.sites.get(path, {})
        return own["gradient-gram"].mean()[group] if "gradient-gram" in own else None

    def _untouched(self, arrival: Arrival) -> bool:
        """Whether a dense site sees what the original sees and its skip branch carries no error."""
        return arrival.inputs.same and (arrival.skip is None or arrival.skip.same)

    def _moments(self, arrival: Arrival, layer: nn.Module, adapter: Adapter) -> tuple[PairMoments, PairMoments]:
        geometry = adapter.geometry(layer)
        first: Tensor = arrival.inputs.compressed[0]
        out = geometry.canonical_shape[0]
        fit, held = (PairMoments.zeros(geometry.groups, geometry.features, out, first.device) for _ in range(2))
        scale = self._scale(arrival)
        samples = sum(len(mask) for mask in self.held)
        generator = torch.Generator().manual_seed(self.plan.seed)
        for i, (inputs, target) in enumerate(zip(arrival.inputs.compressed, arrival.outputs, strict=True)):
            if scale is not None and arrival.skip is not None and not arrival.skip.same:
                lost = arrival.skip.original[i] - arrival.skip.compressed[i]
                target = target + lost * scale
            positions = self._positions(adapter, layer, inputs, samples, generator)
            for moments, mask in ((fit, ~self.held[i]), (held, self.held[i])):
                if bool(mask.any()):
                    moments.update(
                        adapter.patches(layer, inputs[mask], positions), adapter.outputs(layer, target[mask], positions)
                    )
        return fit, held

    def _positions(
        self, adapter: Adapter, layer: nn.Module, inputs: Tensor, samples: int, generator: torch.Generator
    ) -> Tensor | None:
        size, _ = adapter.sample_size(layer, inputs)
        geometry = adapter.geometry(layer)
        available = prod(geometry.output_size(size)) if size else inputs.shape[1:-1].numel()
        wanted = -(-max(16384, self.options.samples_per_feature * geometry.features) // samples)
        if available <= wanted:
            return None
        return torch.randperm(available, generator=generator)[:wanted].sort().values

    def _scale(self, arrival: Arrival) -> Tensor | float | None:
        """`1/a` of the steps to the residual `add`; channels with a small `a` take up nothing."""
        if not self.options.absorb_skip or arrival.skip is None or arrival.skip.same:
            return None
        output: Tensor = arrival.outputs[0]
        factor = channel_scale(arrival.call, output.shape, arrival.tensor)
        if factor is None:
            return 1.0
        size = factor.abs()
        usable = size > 0.05 * size.median()
        return torch.where(usable, 1 / factor, 0.0).to(output.dtype)

    def _build(
        self,
        layer: nn.Module,
        adapter: Adapter,
        decision: Decision,
        factors: list[Factors],
        dense: list[Tensor],
        bias: Tensor | None,
    ) -> nn.Module:
        weight = adapter.canonical(layer)
        if decision.method is None or decision.rank is None:
            new = copy.deepcopy(layer)
            with torch.no_grad():
                adapter.canonical(new).copy_(torch.stack(dense))
                if bias is not None:
                    tensor(new, "bias").copy_(bias)
            return new
        shell = build_shell(
            adapter.geometry(layer), decision.method.form, decision.rank, device=weight.device, dtype=weight.dtype
        )
        fill_shell(shell, factors, bias)
        for parameter in shell.parameters():
            parameter.requires_grad_(weight.requires_grad)
        return shell.train(layer.training)

    def _shift_norm(self, name: str, bias: Tensor) -> None:
        """Let a batch norm take a layer's bias: `(x + b − m)·s = (x − (m − b))·s`."""
        module, _, buffer = name.rpartition(".")
        mean = tensor(self.modules[module], buffer)
        self.result.buffers[name] = (widen(mean) - bias).to(mean.dtype)

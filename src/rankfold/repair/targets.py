"""What a site sees in a lockstep pass: the compressed network's inputs, and the targets its outputs are fitted to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import NumericsError
from rankfold.graph.activations import activation_behind
from rankfold.graph.regions import channel_scale
from rankfold.graph.walk import Arrival
from rankfold.layers import Adapter, adapter_for
from rankfold.plan.repair import Lockstep
from rankfold.repair.activation import Past, Rows
from rankfold.repair.gather import Gather, LaterCalls, Share
from rankfold.repair.moments import SplitMoments
from rankfold.repair.widened import channel_axis, narrowed

SMALL_SCALE = 0.05  # of the median scale: channels scaled by less cannot take up the skip branch's error


class Targets:
    """Moments of the inputs and targets of one site after another.

    Args:
        modules: The original's modules by path, narrowed where channels go.
        options: The repair's options.
        share: The micro-batches walked here.
        seed: Seed of the draw of positions.
        kept: Channels of each site that stay, by path.
        alone: Numbers of rows that a site sees of one sample alone, by path; empty where they are not known.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        options: Lockstep,
        share: Share,
        seed: int,
        kept: Mapping[str, Kept],
        alone: Mapping[str, Collection[int]],
    ) -> None:
        self._modules, self._options, self._share, self._seed = modules, options, share, seed
        self._kept, self._alone = kept, alone
        self._later: dict[str, SplitMoments] = {}  # moments of all calls but the first, by path

    def moments(self, arrival: Arrival, layer: nn.Module, adapter: Adapter) -> SplitMoments:
        """Moments of (x', target) over all calls of a site, by half and of held-out samples.

        Args:
            arrival: State of the walk before the site.
            layer: The layer.
            adapter: Adapter of the layer.
        """
        path = arrival.call.path
        gather = self.gather(path, layer, adapter, arrival.inputs.compressed[0].device)
        for i, inputs, target, *skip in self.calls(arrival):
            gather.add(i, inputs, target, *skip)
        seen = gather.summed()
        if path in self._later:
            seen = seen.add(self._later[path])
        self.check_finite(arrival, seen)
        return seen

    def calls(self, arrival: Arrival, *, always: bool = False) -> Iterator[tuple[Any, ...]]:
        """What `Gather.add` takes for each micro-batch: the skip branches where they differ, or one always."""
        scale = self._inverse_scale(arrival)
        for i, (inputs, target) in enumerate(zip(arrival.inputs.compressed, arrival.outputs, strict=True)):
            skip: tuple[Tensor, ...] = ()
            if arrival.skip is not None and (scale is not None or always):
                skip = (arrival.skip.compressed[i],)
                if scale is not None:
                    skip = (*skip, arrival.skip.original[i], scale.expand(target.shape))
            yield i, inputs, target, *skip

    def check_finite(self, arrival: Arrival, seen: SplitMoments) -> None:
        """Refuse activations that are not finite."""
        for moments, part in zip(seen.parts, ("fitted", "fitted", "held-out"), strict=True):
            if not bool(torch.isfinite(moments.xx).all() and torch.isfinite(moments.yx).all()):
                raise NumericsError(
                    repr(arrival.call.path),
                    law="every activation of both networks is finite",
                    got=f"NaN or infinity in {_not_finite(arrival, part, self._share.starts)}",
                    cure="look at that sample, or exclude the layers before this one",
                )

    def gather(self, path: str, layer: nn.Module, adapter: Adapter, device: torch.device) -> Gather:
        """The collector of a site's inputs and targets."""
        kept = self._kept.get(path, Kept())
        dense, seed, alone = self._options.samples_per_feature, self._seed, self._alone.get(path, ())
        return Gather(layer, adapter, kept, self._share, dense, seed, device, alone)

    def look_ahead(self, model: nn.Module, paths: Collection[str]) -> None:
        """Run the original over the calibration set, and collect the moments of some sites at their later calls.

        A layer that is called several times is solved at its first call, on the inputs of all calls. Its later inputs
        in the compressed network depend on that very solution; the original's inputs and outputs stand for them.

        Args:
            model: The original.
            paths: Paths of the sites.
        """
        originals = dict(model.named_modules(remove_duplicate=False))
        gathers: dict[str, Gather] = {}
        for path in sorted(paths):
            adapter = adapter_for(self._modules[path])
            if adapter is None:
                raise TypeError(f"{path} has no adapter")
            gathers[path] = self.gather(path, self._modules[path], adapter, device_of(model))
        with evaluating(model):
            for index, part in enumerate(self._share.parts):
                hooks = [LaterCalls(gather, index) for gather in gathers.values()]
                handles = [
                    originals[path].register_forward_hook(hook, with_kwargs=True)
                    for path, hook in zip(gathers, hooks, strict=True)
                ]
                try:
                    run(model, part)
                finally:
                    for handle in handles:
                        handle.remove()
        self._later = {path: gather.summed() for path, gather in gathers.items()}

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

    def past(self, arrival: Arrival, layer: nn.Module, adapter: Adapter) -> Past | None:
        """The activation that stands behind a site, where the targets can be seen past it."""
        path, call = arrival.call.path, arrival.call
        axis = channel_axis(layer)
        activation = activation_behind(call, axis) if self._options.activation and path not in self._later else None
        if activation is None or (activation.skip and (arrival.skip is None or not self._options.absorb_skip)):
            return None
        kept = self._kept.get(path, Kept()).outputs
        ends = activation.affine(arrival.outputs[0].shape, axis, arrival.tensor)
        groups = adapter.geometry(layer).groups
        factor, offset = (narrowed(each, 0, kept).reshape(groups, 1, -1) for each in ends)
        gather = self.gather(path, layer, adapter, arrival.inputs.compressed[0].device)

        def rows(only: int | None) -> Rows:
            for i, inputs, target, *skip in self.calls(arrival, always=activation.skip):
                yield from gather.rows(i, inputs, target, *skip, only=only)

        return Past(activation, factor, offset, rows, self._share.world)


def _not_finite(arrival: Arrival, part: str, starts: Sequence[int]) -> str:
    """The first sample, from 1 in the order of the data, with an activation that is not finite."""
    for start, inputs, target in zip(starts, arrival.inputs.compressed, arrival.outputs, strict=True):
        for row in range(min(len(inputs), len(target))):
            if not bool(torch.isfinite(inputs[row]).all() and torch.isfinite(target[row]).all()):
                return f"sample {start + row + 1} of the calibration data"
    return f"the sums over the {part} samples"

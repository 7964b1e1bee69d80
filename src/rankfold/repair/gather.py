"""What one site is given, summed up over the micro-batches: by half of the samples, and of those held out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.data.batches import Batch
from rankfold.data.draws import enough_positions, generator
from rankfold.distributed import ALONE, World
from rankfold.layers import Adapter
from rankfold.layers.calls import rows_of
from rankfold.repair.moments import FIRST, HELD, SECOND, SplitMoments
from rankfold.repair.widened import channel_axis, narrowed
from rankfold.statistics.collect import chunks, labels_of_rows, of_rows, tells_apart


@dataclass(eq=False)
class Share:
    """What one process walks of the calibration set.

    Attributes:
        parts: Its micro-batches.
        held: For each of its micro-batches, which samples are held out.
        numbers: For each of them, its number among those of all processes.
        starts: For each of them, the place of its first sample in the whole set.
        samples: How many samples the positions are drawn for: all of all processes, or more where these are a part.
        judging: How many samples of all processes are held out.
        world: The processes.
    """

    parts: list[Batch]
    held: list[Tensor]
    numbers: list[int]
    starts: list[int]
    samples: int
    judging: int = 0
    world: World = ALONE

    def labels_of(self, index: int, rows: int, alone: Collection[int]) -> Tensor:
        """For every row of a layer's input in a micro-batch whether it is of the first half, the second, or held out.

        Where no sample can be told apart, all rows are fitted on, in one half or the other by turns.

        Args:
            index: Of the micro-batch, among those walked here.
            rows: How many rows the layer sees.
            alone: How many it sees of one sample alone; empty where that is not known.
        """
        held, start = self.held[index], self.starts[index]
        if not tells_apart(rows, len(held), alone):
            return torch.full((rows,), self.numbers[index] % 2)
        fitted = torch.where(torch.arange(start, start + len(held)) % 2 == 0, FIRST, SECOND)
        return labels_of_rows(torch.where(held, HELD, fitted), rows, alone)


class Gather:
    """Takes in inputs and targets of one site.

    Args:
        layer: The layer, narrowed where channels go.
        adapter: Of the layer.
        kept: What stays of its channels.
        share: The micro-batches.
        per_feature: Positions looked at for each feature.
        seed: Of the draw of positions.
        device: Where the sums are kept.
        alone: How many rows the layer sees of one sample alone; empty where that is not known.
    """

    def __init__(
        self,
        layer: nn.Module,
        adapter: Adapter,
        kept: Kept,
        share: Share,
        per_feature: int,
        seed: int,
        device: torch.device,
        alone: Collection[int] = (),
    ) -> None:
        self._layer, self._adapter, self._kept, self._share = layer, adapter, kept, share
        self._per_feature, self._seed, self._alone = per_feature, seed, alone
        geometry = adapter.geometry(layer)
        self._seen = SplitMoments.zeros(geometry.groups, geometry.features, geometry.canonical_shape[0], device)

    def add(self, index: int, inputs: Tensor, target: Tensor, *skip: Tensor, call: int = 1) -> None:
        """Add one call on one micro-batch, at positions drawn by the seed.

        Args:
            index: Of the micro-batch, among those walked here.
            inputs: What the layer is given, in full width.
            target: The output that is wanted, in full width.
            skip: The skip branch in both networks, and the inverse scale by which their difference counts.
            call: Number of the call, from 1.
        """
        layer, adapter, axis = self._layer, self._adapter, channel_axis(self._layer)
        positions = self._positions(inputs, index, call)
        labels = self._share.labels_of(index, rows_of(adapter, layer, inputs), self._alone).to(inputs.device)
        read = [narrowed(each, axis, self._kept.outputs) for each in (target, *skip)]
        inputs = narrowed(inputs, axis, self._kept.inputs)
        for rows, patches, (wanted, *rest) in chunks(adapter, layer, inputs, read, positions):
            if rest:
                original, compressed, factor = rest
                wanted = wanted + (original - compressed) * factor
            for label, moments in enumerate(self._seen.parts):
                chosen = labels[rows] == label
                if bool(chosen.any()):
                    moments.update(of_rows(patches, chosen), of_rows(wanted, chosen))

    def summed(self) -> SplitMoments:
        """The moments over the samples of all processes."""
        for moments in self._seen.parts:
            moments.sum_over(self._share.world)
        return self._seen

    def _positions(self, inputs: Tensor, index: int, call: int) -> Tensor | None:
        size, _ = self._adapter.sample_size(self._layer, inputs)
        geometry = self._adapter.geometry(self._layer)
        available = prod(geometry.output_size(size)) if size else inputs.shape[1:-1].numel()
        wanted = enough_positions(geometry.features, self._per_feature, self._share.samples)
        if available <= wanted:
            return None
        key = (self._seed, self._share.numbers[index], *([call] if call > 1 else []))
        return torch.randperm(available, generator=generator(*key))[:wanted].sort().values

"""Moments of one site over the micro-batches: of each half of the fitted samples, and of the held-out samples."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.channels.narrowing import Kept
from rankfold.data.batches import Batch
from rankfold.data.draws import enough_positions, generator
from rankfold.distributed import ALONE, World
from rankfold.layers import Adapter
from rankfold.layers.calls import input_of, rows_of
from rankfold.repair.moments import FIRST, HELD, SECOND, SplitMoments
from rankfold.repair.widened import channel_axis, narrowed
from rankfold.statistics.collect import chunks, labels_of_rows, of_rows, tells_apart


@dataclass(eq=False)
class Share:
    """The part of the calibration set that one process walks.

    Attributes:
        parts: Micro-batches of this process.
        held: Masks, one for each of these micro-batches, shape (samples,): True for samples that are held out.
        numbers: Number of each of these micro-batches among those of all processes, from 0.
        starts: Index of the first sample of each of these micro-batches in the whole set.
        samples: Number of samples that positions are drawn for: all of all processes, or more where these are a part.
        judging: Number of held-out samples in all processes.
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
        """Label of every row of a layer's input in a micro-batch: first half, second half, or held out.

        Where rows cannot be assigned to samples, all of them are fitted on, and micro-batches alternate between halves.

        Args:
            index: Index of the micro-batch, among those of this process.
            rows: Number of rows that the layer sees.
            alone: Numbers of rows that the layer sees of one sample alone; empty where they are not known.
        """
        held, start = self.held[index], self.starts[index]
        if not tells_apart(rows, len(held), alone):
            return torch.full((rows,), self.numbers[index] % 2)
        fitted = torch.where(torch.arange(start, start + len(held)) % 2 == 0, FIRST, SECOND)
        return labels_of_rows(torch.where(held, HELD, fitted), rows, alone)


class Gather:
    """Collector of the moments of one site's inputs and targets.

    Args:
        layer: The layer, narrowed where channels go.
        adapter: Adapter of the layer.
        kept: Channels of the layer that stay.
        share: The micro-batches.
        per_feature: Number of positions looked at for each feature.
        seed: Seed of the draw of positions.
        device: Device on which the sums are kept.
        alone: Numbers of rows that the layer sees of one sample alone; empty where they are not known.
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
        self._per_feature, self._seed, self._alone, self._device = per_feature, seed, alone, device

    @cached_property
    def _seen(self) -> SplitMoments:
        """The sums, which are as large as a Gram, and not made where only rows are asked for."""
        geometry = self._adapter.geometry(self._layer)
        return SplitMoments.zeros(geometry.groups, geometry.features, geometry.canonical_shape[0], self._device)

    def add(self, index: int, inputs: Tensor, target: Tensor, *skip: Tensor, call: int = 1) -> None:
        """Add one call on one micro-batch, at positions drawn by the seed.

        Args:
            index: Index of the micro-batch, among those of this process.
            inputs: Inputs of the layer, in full width.
            target: Target of the output, in full width.
            skip: The skip branch in the compressed network; and where it differs in the original, that, and the inverse
                scale by which the difference counts.
            call: Number of the call, from 1.
        """
        for labels, patches, wanted, _ in self.rows(index, inputs, target, *skip, call=call):
            for label, moments in enumerate(self._seen.parts):
                chosen = labels == label
                if bool(chosen.any()):
                    moments.update(of_rows(patches, chosen), of_rows(wanted, chosen))

    def rows(
        self, index: int, inputs: Tensor, target: Tensor, *skip: Tensor, call: int = 1, only: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The positions of one call on one micro-batch, as `add` takes them, in chunks.

        Args:
            index: Index of the micro-batch, as for `add`; so are the other arguments.
            inputs: Inputs of the layer.
            target: Target of the output.
            skip: The skip branch.
            call: Number of the call.
            only: Label of the rows that are looked at; None is all.

        Yields:
            Label of every row, patches (groups, positions, n), targets (groups, positions, out), and the compressed
            network's skip branch there, in the shape of the targets; None without one.
        """
        layer, adapter, axis = self._layer, self._adapter, channel_axis(self._layer)
        inputs = adapter.read(layer, inputs)
        positions = self._positions(inputs, index, call)
        labels = self._share.labels_of(index, rows_of(adapter, layer, inputs), self._alone).to(inputs.device)
        read = [narrowed(each, axis, self._kept.outputs) for each in (target, *skip)]
        inputs = narrowed(inputs, axis, self._kept.inputs)
        if only is not None and not bool((chosen := labels == only).all()):
            if not bool(chosen.any()):
                return
            labels, inputs, *read = (each[chosen] for each in (labels, inputs, *read))
        for rows, patches, (wanted, *rest) in chunks(adapter, layer, inputs, read, positions):
            if len(rest) > 1:
                compressed, original, factor = rest
                wanted = wanted + (original - compressed) * factor
            yield labels[rows], patches, wanted, rest[0] if rest else None

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


class LaterCalls:
    """Forward hook of a site on one micro-batch: collects all calls but the first.

    Args:
        gather: Collector of the site's inputs and targets.
        index: Index of the micro-batch.
    """

    def __init__(self, gather: Gather, index: int) -> None:
        self._gather, self._index, self._calls = gather, index, 0

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        """Collect a call that is not the first."""
        self._calls += 1
        if self._calls > 1:
            inputs = input_of(args, options)
            self._gather.add(self._index, inputs, output, call=self._calls)

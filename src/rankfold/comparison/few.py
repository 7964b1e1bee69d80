"""What a change of a model does to its outputs on a few samples, for many changes one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.comparison.compare import run_on
from rankfold.comparison.tally import lost_share
from rankfold.data.batches import Batch, batch_size, take
from rankfold.data.running import evaluating
from rankfold.data.splits import first_of, merged
from rankfold.distributed import ALONE, World
from rankfold.outputs.taken import Taken, first_samples


@dataclass(frozen=True, eq=False)
class Few:
    """A few samples, and what the original makes of them.

    Attributes:
        batch: The samples; None in a process that has none of them.
        outputs: Outputs of the original that count, in the order of their kinds.
        taken: Kinds of the outputs.
        world: The processes that share the samples.
    """

    batch: Batch | None
    outputs: list[Tensor]
    taken: Taken
    world: World

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Batch], samples: int | None, taken: Taken, world: World = ALONE
    ) -> Few:
        """The first samples of some batches.

        Args:
            model: The original.
            batches: The batches.
            samples: Number of samples, at most; None is a whole batch, where the model takes no other number.
            taken: Kinds of the outputs.
            world: Processes that share the samples, each an even part.
        """
        batch: Batch | None = first_of(batches)
        if samples is not None:
            batch = merged(first_samples(batches, samples, samples), samples)[0]
            here = torch.arange(min(samples, batch_size(batch))).tensor_split(world.size)[world.rank]
            batch = take(batch, here) if len(here) else None
        if batch is None:
            return cls(None, [], taken, world)
        with evaluating(model):
            outputs = taken.of(run_on("original", model, batch, 0))
        return cls(batch, outputs, taken, world)

    def lost(self, model: nn.Module) -> float:
        """The divergence of a model's outputs, as of a `Comparison`; infinity or NaN where an output is not finite."""
        sums = torch.zeros(len(self.taken.kinds), 2, dtype=torch.float64)
        if self.batch is not None:
            with evaluating(model):
                outputs = self.taken.of(run_on("compressed", model, self.batch, 0))
            for i, (kind, mine, theirs) in enumerate(
                zip(self.taken.kinds.values(), self.outputs, outputs, strict=True)
            ):
                for own, first, second in kind.pieces(mine, theirs):
                    sums[i] += own.error(first.double(), second.double()).cpu()
        self.world.sum_([sums])
        return sum(lost_share(*each) for each in sums.tolist()) / len(sums)

"""What a change of a model does to its outputs on a few samples, for many changes one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from rankfold.comparison.compare import run_on
from rankfold.comparison.tally import lost_share
from rankfold.data.batches import Batch, batch_size
from rankfold.data.running import evaluating
from rankfold.data.splits import merged
from rankfold.distributed import ALONE, World
from rankfold.outputs.taken import Taken, first_samples

KEPT = 2**28  # bytes of outputs of the original that are kept; those beyond it are computed again for every change


@dataclass(frozen=True, eq=False)
class Few:
    """A few samples, and what the original makes of them.

    Attributes:
        model: The original.
        batches: The samples that this process has.
        outputs: Outputs of the original that count, in the order of their kinds, of each batch; None where they are too
            large to be kept.
        taken: Kinds of the outputs.
        samples: Number of samples of all processes.
        world: The processes that share the samples.
    """

    model: nn.Module
    batches: Sequence[Batch]
    outputs: Sequence[list[Tensor] | None]
    taken: Taken
    samples: int
    world: World

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Batch],
        samples: int,
        taken: Taken,
        *,
        at_once: int | None,
        world: World = ALONE,
    ) -> Few:
        """The first samples of some batches.

        Args:
            model: The original.
            batches: The batches.
            samples: Number of samples.
            taken: Kinds of the outputs.
            at_once: Number of samples that run at once; None is whole batches, as many as have so many samples, where
                the model takes no other number.
            world: Processes that share the batches.
        """
        if at_once is None:
            found, left = [], samples
            for batch in batches:
                found.append(batch)
                left -= batch_size(batch)
                if left <= 0:
                    break
        else:
            found = merged(first_samples(batches, samples, at_once), at_once)
        own = list(islice(found, world.rank, None, world.size))
        kept: list[list[Tensor] | None] = []
        room = KEPT
        with evaluating(model):
            for batch in own:
                outputs = taken.of(run_on("original", model, batch, 0)) if room > 0 else []
                room -= sum(each.nbytes for each in outputs)
                kept.append(outputs if room > 0 else None)
        return cls(model, own, kept, taken, sum(batch_size(batch) for batch in found), world)

    def lost(self, model: nn.Module) -> float:
        """The divergence of a model's outputs, as of a `Comparison`; infinity or NaN where an output is not finite."""
        sums = torch.zeros(len(self.taken.kinds), 2, dtype=torch.float64)
        with evaluating(self.model), evaluating(model):
            for batch, kept in zip(self.batches, self.outputs, strict=True):
                outputs = self.taken.of(run_on("compressed", model, batch, 0))
                expected = self.taken.of(run_on("original", self.model, batch, 0)) if kept is None else kept
                for i, (kind, mine, theirs) in enumerate(
                    zip(self.taken.kinds.values(), expected, outputs, strict=True)
                ):
                    for own, first, second in kind.pieces(mine, theirs):
                        sums[i] += own.error(first.double(), second.double()).cpu()
        self.world.sum_([sums])
        return sum(lost_share(*each) for each in sums.tolist()) / len(sums)

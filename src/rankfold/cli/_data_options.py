"""Options by which data that is named on the command line is cut into batches and brought into shape."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.cli._errors import UsageError
from rankfold.cli._names import parse_numbers


@dataclass(frozen=True)
class DataOptions:
    """Options by which data is cut into batches and brought into shape.

    Attributes:
        batch_size: Number of samples a batch; None is 32, and the batches that a factory itself makes.
        limit: Maximum number of samples; None is all.
        size: Side in pixels of the square that images are brought to.
        mean: Mean of each channel, subtracted after scaling pixels to 0 … 1; as many as there are channels (1 or 3).
        std: Standard deviation of each channel, by which pixels are divided.
        length: Number of tokens in a block of text.
    """

    batch_size: int | None
    limit: int | None
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    length: int

    @classmethod
    def parse(
        cls, *, batch_size: int | None, limit: int | None, size: int, mean: str, std: str, length: int
    ) -> DataOptions:
        """The options from what was typed.

        Raises:
            UsageError: Means and deviations that are no numbers, or not one or three each, or a deviation of 0.
        """
        means, deviations = parse_numbers(mean, float, option="--mean"), parse_numbers(std, float, option="--std")
        if len(means) != len(deviations) or len(means) not in {1, 3} or min(deviations) <= 0:
            raise UsageError(
                f"--mean {mean} --std {std}",
                law="one number each (grey) or three each (colour), deviations above 0",
                got=f"{len(means)} and {len(deviations)}",
                cure="for example --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5",
            )
        return cls(batch_size, limit, size, means, deviations, length)

    @property
    def step(self) -> int:
        """Number of samples a batch."""
        return self.batch_size or 32


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` samples, evenly spaced, so that files sorted by class give every class."""
    kept = count if limit is None else min(count, limit)
    return [index * count // kept for index in range(kept)] if kept else []

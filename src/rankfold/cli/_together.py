"""A command under `torchrun`: all processes work, the first one prints and writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankfold.cli._options import parse_device


@contextmanager
def process_group(device: str) -> Iterator[bool]:
    """Join the other processes where `torchrun` started several.

    Args:
        device: Name of the device as typed.

    Yields:
        True if this process is the one that shows progress, writes the result and prints it.
    """
    from rankfold import distributed

    with distributed.joined(parse_device(device)) as world:
        yield world.rank == 0

"""Several processes as one: shares of the data, sums over all of them, and an end for all where one fails."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rankfold.errors import DistributedError

PATIENCE = timedelta(minutes=10)  # how long the command line waits for a process that neither comes nor ends
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that work on one compression, and which of them this is.

    All methods but `owns` are collective: every process calls them in the same order, with tensors of the same shapes.
    Each begins with a round in which all report that they are well, so that one that failed ends the others.

    Attributes:
        size: Number of processes; with one of them every method does nothing.
        rank: Number of this process, from 0.
    """

    size: int = 1
    rank: int = 0

    def owns(self, number: int) -> bool:
        """Whether the `number`-th piece of work, counted over all processes, is this one's: they take turns."""
        return number % self.size == self.rank

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes; all get the same bits."""
        self._each(tensors, lambda value: dist.all_reduce(value))

    def largest_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their element-wise maxima over all processes."""
        self._each(tensors, lambda value: dist.all_reduce(value, dist.ReduceOp.MAX))

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors, of any dtype, by those of one process, bit by bit.

        Args:
            tensors: Tensors that are changed in place.
            source: Number of a piece of work; the tensors of the process that owns it are sent.
        """
        self._each(tensors, lambda value: dist.broadcast(value.view(-1).view(torch.uint8), source % self.size))

    def agree(self, what: str, text: str) -> None:
        """Make sure that a text is the same in every process.

        Raises:
            DistributedError: The texts differ; this is raised in every process.
        """
        if self.size == 1:
            return
        mine = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.float64)
        theirs = mine.clone()
        self.broadcast_([theirs], 0)
        differs = torch.tensor([float(not torch.equal(mine, theirs))], dtype=torch.float64)
        self.sum_([differs])
        if bool(differs > 0):
            raise DistributedError(
                self._place(),
                law=f"every process has the same {what}",
                got="different ones",
                cure="pass the same model, data in the same order, and options in every process",
            )

    def check_in(self, *, failed: bool = False) -> None:
        """Report to all others whether this process is well, and learn the same of them.

        Raises:
            DistributedError: Another process failed, or is gone.
        """
        flags = torch.zeros(self.size, dtype=torch.float64, device=_device())
        flags[self.rank] = float(failed)
        self._call(lambda: dist.all_reduce(flags))
        others = [rank for rank in torch.nonzero(flags).flatten().tolist() if rank != self.rank]
        if others and not failed:
            raise DistributedError(
                self._place(),
                law="all processes finish together",
                got=f"an error in process {', '.join(map(str, others))}",
                cure="see the error of that process",
            )

    def _each(self, tensors: Sequence[Tensor], operation: Callable[[Tensor], object]) -> None:
        if self.size == 1:
            return
        self.check_in()
        for value in tensors:
            staged = value.detach().to(_device()).contiguous()
            self._call(functools.partial(operation, staged))
            if staged.data_ptr() != value.data_ptr():
                value.detach().copy_(staged)

    def _call(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as cause:
            raise DistributedError(
                self._place(),
                law="every process answers until the end",
                got=str(cause).splitlines()[0][:200],
                cure="a process was killed, crashed, ran out of memory or hangs: look at its output",
            ) from cause

    def _place(self) -> str:
        return f"process {self.rank} of {self.size}"


ALONE = World()


def world() -> World:
    """The processes of torch.distributed's default group; `ALONE` where it was not initialised or holds just one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return World(dist.get_world_size(), dist.get_rank())
    return ALONE


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function collective: where it raises in one process, it raises `DistributedError` in all others."""

    @functools.wraps(function)
    def collective(*args: P.args, **kwargs: P.kwargs) -> T:
        all_of_us = world()
        if all_of_us.size == 1:
            return function(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
            all_of_us.check_in()
        except DistributedError:  # all others have it too, or cannot be reached
            raise
        except Exception:
            with suppress(DistributedError):
                all_of_us.check_in(failed=True)
            raise
        return result

    return collective


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that `torchrun` started, by the environment that it set; does nothing without it.

    Args:
        device: Device that the model is on: CUDA devices communicate by NCCL, one device a process; all others by Gloo.

    Raises:
        DistributedError: The others cannot be reached.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield world()
        return
    place = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as cause:
        raise DistributedError(
            place,
            law="the processes named in the environment find each other",
            got=str(cause).splitlines()[0][:200],
            cure="start the command by torchrun, or unset WORLD_SIZE",
        ) from cause
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    """Device that tensors must be on to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

"""Speed of this machine at the steps of a compression, measured in a few tenths of a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.data.batches import Batch, batch_size, to_device
from rankfold.data.running import evaluating, run
from rankfold.decompositions import Decomposition, Moments, factorise, output_errors
from rankfold.linalg.interpolative import backward_elimination
from rankfold.linalg.precision import work_dtype

WIDEST = 320  # features and outputs of a weight that a method is timed on
WIDTH = 256  # features of the matrices whose products and factors are timed
FLATTEST, STEEPEST = 1.0, 2.0  # powers of a weight's size that its time grows with: elements, and cubes of its sides
ROWS = 4096  # rows of the product that is timed
REPEATS = 2  # timed runs after one to warm up; the fastest counts

Maker: TypeAlias = Callable[[tuple[int, ...]], Callable[[], object]]  # a shape → the work that is timed


class Rates:
    """Seconds of the steps of a compression, each measured once.

    Args:
        device: Device that the compression runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._draw = torch.Generator().manual_seed(0)
        self._seconds: dict[tuple[object, ...], float] = {}

    def timed(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        """Seconds of some work, warmed up."""
        best = float("inf")
        for number in range(repeats + 1):
            start = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            if number:
                best = min(best, time.perf_counter() - start)
        return best

    def forward(self, model: nn.Module, batch: Batch) -> float:
        """Seconds a sample of one forward pass over a batch, in eval mode."""
        moved = to_device(batch, self._device)
        with evaluating(model):
            return self.timed(lambda: run(model, moved), repeats=1) / batch_size(batch)

    @cached_property
    def _product(self) -> float:
        rows = self._drawn(ROWS, WIDTH).float()
        return self.timed(lambda: rows.mT @ rows) / (ROWS * WIDTH * WIDTH)

    @cached_property
    def _copy(self) -> float:
        values = self._drawn(ROWS, WIDTH).float()
        return self.timed(lambda: values.double()) / values.numel()

    @cached_property
    def _factor(self) -> float:
        matrix = self._gram(WIDTH)
        right = self._drawn(WIDTH, WIDTH)
        return self.timed(lambda: torch.cholesky_solve(right, torch.linalg.cholesky(matrix))) / WIDTH**3

    def product(self, multiplications: float) -> float:
        """Seconds of so many multiply-adds of large matrices in float32."""
        return multiplications * self._product

    def copy(self, elements: float) -> float:
        """Seconds of writing so many numbers elsewhere."""
        return elements * self._copy

    def solve(self, features: int) -> float:
        """Seconds of a Cholesky factor and a solve with as many right sides, of n features."""
        return self._factor * features**3

    def elimination(self, units: int, taps: int, outputs: int) -> float:
        """Seconds of ordering the units of a channel group by one layer that reads so many taps of each."""

        def work(shape: tuple[int, ...]) -> Callable[[], object]:
            tall, few, narrow = shape
            reader = (self._gram(few * narrow).reshape(few, narrow, few, narrow), self._drawn(tall, few, narrow))
            return lambda: backward_elimination([reader])

        return self._scaled("elimination", (outputs, units, taps), work)

    def errors(self, method: Decomposition, shape: Sequence[int]) -> float:
        """Seconds of a method's errors at all ranks, judged on others, of a weight of a shape (out, in, kernel…)."""

        def work(small: tuple[int, ...]) -> Callable[[], object]:
            weight, moments = self._problem(small)
            return lambda: output_errors(method, weight, moments, moments)

        return self._scaled(("errors", method), shape, work)

    def decompose(self, method: Decomposition, shape: Sequence[int]) -> float:
        """Seconds of one decomposition, at the middle one of the ranks."""

        def work(small: tuple[int, ...]) -> Callable[[], object]:
            weight, moments = self._problem(small)
            ranks = method.ranks(small)
            return lambda: factorise(method, weight, ranks[len(ranks) // 2], moments)

        return self._scaled(("decompose", method), shape, work)

    def _scaled(self, what: object, shape: Sequence[int], make: Maker) -> float:
        """Seconds at a shape; where it is too wide, from two smaller ones by the power that they show."""
        small = _shrunk(tuple(shape), WIDEST)
        if small == tuple(shape):
            return self._once(what, small, make)
        smaller = _shrunk(small, WIDEST // 2)
        first, second = (self._once(what, each, make) for each in (smaller, small))
        ratio = prod(small) / prod(smaller)
        power = math.log(second / first) / math.log(ratio) if ratio > 1 else STEEPEST
        larger: float = (prod(shape) / prod(small)) ** min(max(power, FLATTEST), STEEPEST)
        return second * larger

    def _once(self, what: object, shape: tuple[int, ...], make: Maker) -> float:
        key = (what, shape)
        if key not in self._seconds:
            self._seconds[key] = self.timed(make(shape), repeats=1)
        return self._seconds[key]

    def _problem(self, shape: tuple[int, ...]) -> tuple[Tensor, Moments]:
        """A weight of a shape (out, in, kernel…), and moments for it."""
        inputs, outputs = self._gram(prod(shape[1:])), self._gram(shape[0])
        return self._drawn(*shape), Moments(inputs, inputs.new_zeros(len(inputs)), outputs, True, outputs)

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw, dtype=torch.float64).to(self._device, work_dtype(self._device))

    def _gram(self, features: int) -> Tensor:
        rows = self._drawn(2 * features, features)
        return rows.mT @ rows / len(rows)


def _shrunk(shape: tuple[int, ...], widest: int) -> tuple[int, ...]:
    """A shape with at most so many outputs and features."""
    outputs, *rest = shape
    while prod(rest) > widest:
        largest = rest.index(max(rest))
        rest[largest] = -(-rest[largest] // 2)
    return min(outputs, widest), *rest

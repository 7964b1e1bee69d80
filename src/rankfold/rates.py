"""How fast this machine does what a compression is made of, measured in a few tenths of a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from rankfold.decompositions import Decomposition, Moments, factorise, output_errors
from rankfold.graph.trace import Batch, batch_size, evaluating, run, to_device
from rankfold.linalg.interpolative import backward_elimination
from rankfold.linalg.precision import work_dtype

WIDEST = 256  # features and outputs of a weight that a method is timed on; wider ones go by the cube
ROWS = 4096  # of the product that is timed
REPEATS = 2  # after one to warm up; the fastest counts


class Rates:
    """Measured seconds, each once.

    Args:
        device: Where the compression runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._draw = torch.Generator().manual_seed(0)
        self._methods: dict[tuple[object, ...], float] = {}

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
        rows = self._drawn(ROWS, WIDEST).float()
        return self.timed(lambda: rows.mT @ rows) / (ROWS * WIDEST * WIDEST)

    @cached_property
    def _copy(self) -> float:
        values = self._drawn(ROWS, WIDEST).float()
        return self.timed(lambda: values.double()) / values.numel()

    @cached_property
    def _factor(self) -> float:
        matrix = self._gram(WIDEST)
        right = self._drawn(WIDEST, WIDEST)
        return self.timed(lambda: torch.cholesky_solve(right, torch.linalg.cholesky(matrix))) / WIDEST**3

    def product(self, multiplications: float) -> float:
        """Seconds of so many multiply-adds of large matrices in float32."""
        return multiplications * self._product

    def copy(self, elements: float) -> float:
        """Seconds of writing so many numbers elsewhere."""
        return elements * self._copy

    def solve(self, features: int) -> float:
        """Seconds of a Cholesky factor and a solve with as many right sides, of n features."""
        return self._factor * features**3

    def errors(self, method: Decomposition, shape: Sequence[int]) -> float:
        """Seconds of a method's errors at all its ranks, of one weight of a shape (out, in, kernel…)."""
        return self._of_method("errors", method, shape)

    def decompose(self, method: Decomposition, shape: Sequence[int]) -> float:
        """Seconds of one decomposition, at the middle one of the ranks."""
        return self._of_method("decompose", method, shape)

    def elimination(self, units: int, taps: int, outputs: int) -> float:
        """Seconds of ordering the units of a channel group by one layer that reads so many taps of each."""
        (_, few, narrow), times = _shrunk((outputs, units, taps))
        key = ("elimination", few, narrow)
        if key not in self._methods:
            metric = self._gram(few * narrow).reshape(few, narrow, few, narrow)
            weight = self._drawn(min(outputs, WIDEST), few, narrow)
            self._methods[key] = self.timed(lambda: backward_elimination([(metric, weight)]), repeats=1)
        return self._methods[key] * times

    def _of_method(self, what: str, method: Decomposition, shape: Sequence[int]) -> float:
        small, times = _shrunk(shape)
        key = (what, method, *small)
        if key not in self._methods:
            weight = self._drawn(*small)
            gram = self._gram(prod(small[1:]))
            moments = Moments(gram, gram.new_zeros(len(gram)), self._gram(small[0]), True, self._gram(small[0]))
            ranks = method.candidates(small)
            rank = ranks[len(ranks) // 2]
            if what == "errors":
                self._methods[key] = self.timed(lambda: output_errors(method, weight, moments), repeats=1)
            else:
                self._methods[key] = self.timed(lambda: factorise(method, weight, rank, moments), repeats=1)
        return self._methods[key] * times

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw, dtype=torch.float64).to(self._device, work_dtype(self._device))

    def _gram(self, features: int) -> Tensor:
        rows = self._drawn(2 * features, features)
        return rows.mT @ rows / len(rows)


def _shrunk(shape: Sequence[int]) -> tuple[tuple[int, ...], float]:
    """A shape with at most `WIDEST` outputs and features, and how many times longer the whole one takes."""
    outputs, *rest = shape
    small = list(rest)
    while prod(small) > WIDEST:
        largest = small.index(max(small))
        small[largest] = -(-small[largest] // 2)
    fewer = min(outputs, WIDEST)
    wider, taller = prod(rest) / prod(small), outputs / fewer
    return (fewer, *small), max(wider**3, wider**2 * taller, wider * taller**2)

"""Low rank stored by pivots against a plain pair of the same rank, that is of the same error: size, time, exactness.

    python -m benchmarks.storage [--kept 0.7 0.5] [--threads 1]

The rank is the one at which the pivoted layer keeps a share of the dense one's parameters. Time is that of the dense
layer, measured in turns with it: the median of the ratios. "Folded" is the pivoted layer with its pivots in front, as
if the order of channels had been folded into the layers around it: slices in place of the gather. Exactness is the
largest relative difference from the same product in float64: of weights that are random, and of weights whose singular
values fall off over six decades.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.factors import Factors, MatrixFactors, PivotedFactors
from rankfold.layers import Geometry, build_shell, fill_shell, tensor
from rankfold.linalg.pivots import row_pivots

LINEAR = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (4096, 4096))
CONVOLUTIONS = ((128, 128, 28), (256, 512, 14), (512, 256, 14))
ROUNDS = 30


def rank_of(outputs: int, inputs: int, kept: float) -> int:
    """The rank at which `r (m + n − r)` is a share of `m n`."""
    both = outputs + inputs
    return int((both - math.sqrt(both**2 - 4 * kept * outputs * inputs)) / 2)


def factors_of(outputs: int, inputs: int, rank: int, *, steep: bool = False) -> MatrixFactors:
    """Factors of a random map, with singular values that are alike, or fall off over six decades."""
    draw = torch.Generator().manual_seed(outputs + inputs)
    left = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
    right = torch.randn(rank, inputs, generator=draw, dtype=torch.float64) / math.sqrt(rank * inputs)
    return MatrixFactors(left * torch.logspace(0, -6, rank, dtype=torch.float64) if steep else left, right)


def shell_of(geometry: Geometry, factors: Factors, form: str, dtype: torch.dtype) -> nn.Module:
    """The filled shell of a form."""
    shell = build_shell(geometry, form, factors.ranks, device=torch.device("cpu"), dtype=dtype)
    fill_shell(shell, [factors], None)
    return shell.eval()


class Folded(nn.Module):
    """A pivoted layer without its gather: the same products on slices, for its time alone.

    Args:
        layer: A `PivotedLayer`.
        axis: The channel axis.
    """

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: Tensor) -> Tensor:
        """The products, of channels in another order."""
        own: Any = self.layer
        if own.kept is not None:
            x = x.narrow(self.axis, 0, len(own.kept)) + own.input(x.narrow(self.axis, len(own.kept), len(own.others)))
        value: Tensor = own.core(x)
        return value if own.order is None else torch.cat([value, own.output(value)], self.axis)


@torch.no_grad()
def ratio(layer: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    """Median time of a layer over the dense one's, in turns."""

    def seconds(module: nn.Module, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            module(inputs)
        return time.perf_counter() - start

    calls = max(1, int(0.004 / max(seconds(dense, 3) / 3, 1e-7)))
    seconds(layer, calls)
    return statistics.median(seconds(layer, calls) / seconds(dense, calls) for _ in range(ROUNDS))


@torch.no_grad()
def exactness(outputs: int, inputs: int, rank: int, *, steep: bool, dtype: torch.dtype) -> tuple[float, float, float]:
    """Relative error of the pivoted layer and of the pair, and the largest entry of the table."""
    factors = factors_of(outputs, inputs, rank, steep=steep)
    geometry = Geometry(inputs, outputs)
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = x.to(dtype).double() @ factors.reconstruct().mT
    found = []
    for own, form in ((PivotedFactors(factors), "pivoted-matrix"), (factors, "matrix")):
        got = shell_of(geometry, own, form, dtype)(x.to(dtype)).double()
        found.append(float((got - truth).norm() / truth.norm()))
    table = row_pivots(factors.left if outputs < inputs else factors.right.mT)[2]
    return found[0], found[1], float(table.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes: list[tuple[int, int, int]] = [(*shape, 0) for shape in LINEAR] + list(CONVOLUTIONS)
    for inputs, outputs, pixels in shapes:
        for kept in options.kept:
            rank = rank_of(outputs, inputs, kept)
            ones = ((1, 1), (1, 1), (0, 0), (1, 1)) if pixels else ()
            geometry = Geometry(inputs, outputs, *ones)
            factors = factors_of(outputs, inputs, rank)
            if pixels:
                factors = MatrixFactors(factors.left[..., None, None], factors.right[..., None, None])
            dense = geometry.build(device=torch.device("cpu"), dtype=torch.float32)
            nn.init.normal_(tensor(dense, "weight"), 0, inputs**-0.5)
            pair, pivoted = (
                shell_of(geometry, own, form, torch.float32)
                for own, form in ((factors, "matrix"), (PivotedFactors(factors), "pivoted-matrix"))
            )
            share = rank * (outputs + inputs) / (outputs * inputs)
            line = f"{inputs:>4} → {outputs:<4} {'1×1' if pixels else '   '} rank {rank:<4} params and MACs: "
            line += f"pair {share:.3f} pivoted {sum(p.numel() for p in pivoted.parameters()) / (outputs * inputs):.3f}"
            for batch in (1, 512) if not pixels else (1, 16):
                x = torch.randn(batch, inputs, *(pixels,) * 2) if pixels else torch.randn(batch, inputs)
                folded = Folded(pivoted, -3 if pixels else -1).eval()
                times = ", ".join(
                    f"{name} {ratio(each, dense, x):.2f}"
                    for name, each in (("pair", pair), ("pivoted", pivoted), ("folded", folded))
                )
                line += f"   batch {batch}: {times}"
            print(line, flush=True)
    for steep in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            rows = [
                exactness(outputs, inputs, rank_of(outputs, inputs, 0.7), steep=steep, dtype=dtype)
                for inputs, outputs in LINEAR
            ]
            pivoted_error, pair_error, entry = (max(column) for column in zip(*rows, strict=True))
            kind = "over six decades" if steep else "alike"
            print(
                f"{str(dtype).removeprefix('torch.')}, singular values {kind}: relative "
                f"error pivoted {pivoted_error:.2g}, pair {pair_error:.2g}; largest entry of a table {entry:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

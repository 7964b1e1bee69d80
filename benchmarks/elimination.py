"""Elimination with refit against what any method needs first: the Gram of as many samples as a site is given.

python -m benchmarks.elimination [--channels 512 1024 2048 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import time

import torch

from rankfold.linalg.interpolative import backward_elimination
from rankfold.linalg.precision import gram

OUTPUTS = 1024
ROWS_PER_CHANNEL = 24  # what `compress` collects at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'channels':>9}{'Gram s':>9}{'elimination s':>15}{'ratio':>8}")
    for channels in options.channels:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(ROWS_PER_CHANNEL * channels, channels, generator=draw)
        weight = torch.randn(OUTPUTS, channels, 1, generator=draw)
        start = time.perf_counter()
        second = gram(rows[None])[0] / len(rows)
        between = time.perf_counter()
        backward_elimination([(second.reshape(channels, 1, channels, 1), weight)])
        end = time.perf_counter()
        print(
            f"{channels:>9}{between - start:>9.2f}{end - between:>15.2f}{(end - between) / (between - start):>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

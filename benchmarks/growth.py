"""How the cost of a compression grows with depth: CIFAR ResNets of 20, 38 and 56 layers, the same widths.

    python -m benchmarks.growth [--threads 2]

One plan each, 1,024 images. Printed are sites, seconds of a forward pass over the same images in the same run, seconds
of the compression without the imports that the first of a process pays, and seconds a site.
"""

from __future__ import annotations

import argparse
import time

import torch

import rankfold as rf
from benchmarks.networks import NETWORKS, definitions, forward_seconds

DEPTHS = {20: 3, 38: 6, 56: 9}


def main() -> None:
    """Print one line a depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    trained = NETWORKS["resnet56"]()
    images = trained.calibration(1024, 0)
    rf.compress(definitions().CifarResNet(1).eval(), images[:1], budget=rf.Budget(params=0.5))  # imports
    for depth, blocks in DEPTHS.items():
        model = definitions().CifarResNet(blocks).eval()
        own = trained.model.state_dict()
        model.load_state_dict({name: own[name] for name in model.state_dict()})  # the first blocks of each stage
        forward = forward_seconds(model, images)
        start = time.perf_counter()
        out = rf.compress(model, images, budget=rf.Budget(params=0.5), selector=rf.Lagrangian())
        seconds = time.perf_counter() - start
        sites = sum(row.form != "skipped" for row in out.report.rows)
        stages = {name: round(value / sites, 3) for name, value in out.report.seconds.items()}
        print(
            f"{depth} layers: {sites} sites, forward {forward:.2f} s, compression {seconds:.1f} s"
            f" = {seconds / forward:.1f} forwards = {seconds / sites:.3f} s a site {stages}",
            flush=True,
        )


if __name__ == "__main__":
    main()

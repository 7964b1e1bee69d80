"""Branches that go, one after the other: what the network keeps, and what time it takes.

    python -m benchmarks.branches [--network resnet56 minilm] [--gone 2 4 8 12] [--tried 1 3] [--rest SHARE]

All else stays dense or, with `--rest`, loses channels until that share of the resource is left. `--tried 1` takes the
branch whose loss seems to cost least for what it saves, by the original alone; with more, so many are removed in turn
on a part of the samples, with the repair, and the best one goes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import islice

import torch
from torch import nn

import rankfold as rf
from benchmarks.encoder import batches, embeddings, encoder, sentences
from benchmarks.networks import cifar
from rankfold.cost.counted import count
from rankfold.cost.latency import latency_ratio
from rankfold.data.batches import Batch
from rankfold.proposals import Asked, BranchProposer

CHEAPEST = "channels, cheapest"  # the proposal that removes channels where that costs least


def images(name: str) -> tuple[nn.Module, list[Batch], Callable[[nn.Module], str], Batch]:
    """A network for CIFAR-10, its calibration data, what a smaller one keeps of it, and a batch to time."""
    network = cifar(name)

    @torch.no_grad()
    def keeps(small: nn.Module) -> str:
        right = same = total = 0
        for x, y in network.test:
            answers, before = small(x).argmax(1), network.original(x).argmax(1)
            right, same, total = (
                right + int((answers == y).sum()),
                same + int((answers == before).sum()),
                total + len(y),
            )
        return f"top-1 {100 * right / total:.2f}  agreement {100 * same / total:.2f}"

    return network.model, list(network.calibration(1024, 0)), keeps, network.test[0][0][:64]


def text() -> tuple[nn.Module, list[Batch], Callable[[nn.Module], str], Batch]:
    """MiniLM-L6 likewise."""
    tokenizer, model = encoder()
    test = batches(tokenizer, sentences("test", 500))
    expected = embeddings(model, test)

    def keeps(small: nn.Module) -> str:
        return f"mean cosine {float((embeddings(small, test) * expected).sum(-1).mean()):.4f}"

    timed = {name: value[:16] for name, value in test[0].items()}
    return model, list(batches(tokenizer, sentences("valid", 1024))), keeps, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet56", "minilm"])
    parser.add_argument("--gone", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--tried", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--resource", default="macs")
    parser.add_argument("--rest", type=float, help="share of the resource at which channels stop to go, too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.network:
        model, data, keeps, timed = text() if name == "minilm" else images(name)
        for tried in options.tried:
            start = time.perf_counter()
            family = rf.Branches(tried=tried)
            session = rf.prepare(model, data, families=[family, rf.Interpolative()] if options.rest else [family])
            proposer = next(each for each in session.proposers if isinstance(each, BranchProposer))
            reducer = proposer.branches(alone=True)
            asked = Asked(rf.Budget(**{options.resource: 0.01}), None, rf.Lockstep(), session.trials.score)
            then = Asked(rf.Budget(**{options.resource: options.rest or 1.0}), None, rf.Lockstep(), asked.evaluate)
            how = "the original alone" if tried == 1 else f"{tried} tried after repair"
            for number, reduced in enumerate(islice(proposer.removal(reducer, family, asked), max(options.gone)), 1):
                if number not in options.gone:
                    continue
                plan = reducer.dense(reduced, seed=0, repair=rf.Lockstep())
                if options.rest:
                    made = proposer._by(CHEAPEST, proposer.beside[0], reducer, reduced, then)
                    if made is None:
                        raise ValueError(f"channels alone do not reach {options.rest}")
                    plan = made
                out = session.trials.attempt(plan)
                before, after = (count(each, timed).amounts() for each in (model, out.model))
                left = "  ".join(f"{each} {after[each] / before[each]:.3f}" for each in ("params", "macs"))
                ratio = latency_ratio(model, out.model, timed)
                print(
                    f"{name}  {how}  {number} of {len(reducer.branches)} gone  {left}  {keeps(out.model)}  "
                    f"latency {ratio.ratio:.2f} ({ratio.lower:.2f} to {ratio.upper:.2f})  "
                    f"{time.perf_counter() - start:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()

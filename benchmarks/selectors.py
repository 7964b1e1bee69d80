"""Selectors on one set of curves: the exact knapsack, the Lagrangian, and the ledger of channels and ranks beside them.

    python -m benchmarks.selectors [resnet56 mobilenet_v1 minilm] [--kept 0.7 0.5 0.3]

The gap is what `Lagrangian` is above the least summed error there is, relative to its own; seconds are of the choice
alone, beside those that the curves took. The ledger may remove channels too: its predicted error is that of its ranks,
on the layers that are left, plus that of its channels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import rankfold as rf
from benchmarks import encoder
from benchmarks.ledger import SAMPLES, predicted
from benchmarks.networks import NETWORKS
from rankfold.allocation import Knapsack, Lagrangian
from rankfold.errors import BudgetError
from rankfold.proposals import Asked
from rankfold.proposals._ranks import RankProposer


def prepared(name: str) -> tuple[rf.Session, Callable[[float], rf.Budget]]:
    """A network that was looked at, and the budget of a share: of all parameters, of MiniLM of its encoder's."""
    if name == "minilm":
        tokenizer, model = encoder.encoder()
        data = encoder.batches(tokenizer, encoder.sentences("valid", 1024))
        whole, inner = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
        session = rf.prepare(model, data, exclude=("embeddings.*",))
        return session, lambda kept: rf.Budget(params=int(whole - inner * (1 - kept)))
    network = NETWORKS[name]()
    session = rf.prepare(network.model, network.calibration(SAMPLES[name], 0))
    return session, lambda kept: rf.Budget(params=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet56", "mobilenet_v1", "minilm"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        start = time.perf_counter()
        session, budget_of = prepared(name)
        curves = next(each for each in session.proposers if isinstance(each, RankProposer)).curves()
        count = sum(len(curve.ranks) for curve in curves)
        print(f"{name}: {count} options, curves ready after {time.perf_counter() - start:.0f} s", flush=True)
        for kept in options.kept:
            budget = budget_of(kept)
            problem = curves.problem(budget)
            start = time.perf_counter()
            error = sum(option.error for option in Lagrangian().select(problem))
            print(f"{name} {kept}  Lagrangian: {error:.5f}  {time.perf_counter() - start:.2f} s", flush=True)
            start = time.perf_counter()
            found = Knapsack().solve(problem)
            seconds = time.perf_counter() - start
            how = "exact" if found.least == found.error else f"at most {found.error - found.least:.2g} above the least"
            line = f"{found.error:.5f} ({how}), gap {100 * found.gap:.3f} %"
            print(f"{name} {kept}  Knapsack: {line}  {seconds:.2f} s", flush=True)
            asked = Asked(budget, None, rf.Lockstep(), session.trials.score)
            for proposer in session.proposers:
                for proposal in proposer.proposals(asked):
                    if not proposal.name.startswith("ledger"):
                        continue
                    start = time.perf_counter()
                    try:
                        plan = proposal.make()
                    except BudgetError as cause:
                        print(f"{name} {kept}  {proposal.name}: {cause}", flush=True)
                        continue
                    seconds = time.perf_counter() - start
                    channels, of_ranks = predicted(session.proposers, plan)
                    line = f"{of_ranks:.5f} + {channels:.5f} of channels"
                    print(f"{name} {kept}  {proposal.name}: {line}  {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()

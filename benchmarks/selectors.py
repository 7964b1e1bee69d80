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
from typing import Any

import torch

import rankfold as rf
from benchmarks import encoder
from benchmarks.ledger import SAMPLES, predicted
from benchmarks.networks import NETWORKS
from rankfold.allocation import Knapsack, Lagrangian
from rankfold.allocation.curve import Problem
from rankfold.errors import BudgetError
from rankfold.proposals import Asked
from rankfold.proposals._ranks import RankProposer


class Noting(Knapsack):
    """The knapsack, with what it found about its problem."""

    def solve(self, problem: Problem) -> Any:
        """See `Knapsack.solve`."""
        object.__setattr__(self, "found", super().solve(problem))
        return self.found  # type: ignore[attr-defined]


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
            for selector in (Lagrangian(), Noting()):
                start = time.perf_counter()
                plan = rf.make_plan(curves, budget=budget, selector=selector)
                seconds = time.perf_counter() - start
                error = sum(decision.error or 0.0 for decision in plan.decisions)
                found = getattr(selector, "found", None)
                gap = "" if found is None else f"  gap {100 * found.gap:.3f} %, exact {found.least == found.error}"
                print(f"{name} {kept}  {type(selector).__name__}: {error:.5f}{gap}  {seconds:.2f} s", flush=True)
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

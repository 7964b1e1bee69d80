"""The ledger: errors that are predicted for plans of every kind against measured ones, and half of the way beside it.

    python -m benchmarks.ledger [resnet20 resnet56 mobilenet_v1] [--params 0.7 0.5 …] [--macs 0.5 …] [--judge]

Each default proposal is made for each budget and carried out with its repair on a part of the samples; what its outputs
then lose is *measured*. *Predicted* is the sum of the errors of its ranks and, by a factor, of its channels: 1, or the
scale that the measured ledger found for the budget. The rank correlation is Spearman's, over all plans of a network.
With `--judge` every plan is carried out on all samples too, and judged on the test set.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr

import rankfold as rf
from benchmarks.networks import NETWORKS
from rankfold.decompositions import Decomposition
from rankfold.errors import BudgetError
from rankfold.plan import Plan
from rankfold.proposals import Asked, Proposer
from rankfold.proposals._channels import ChannelProposer
from rankfold.proposals._ranks import RankProposer

SAMPLES = {"resnet20": 1024, "resnet56": 1024, "mobilenet_v1": 250, "mobilenet_v2": 250}
SCALED = "measured ledger + lagrangian"


def predicted(proposers: Sequence[Proposer], plan: Plan) -> tuple[float, float]:
    """Predicted errors of a plan's channels and of its ranks, in the unit of the errors of ranks of the original."""
    ranks = next(each for each in proposers if isinstance(each, RankProposer))
    channels = next(each for each in proposers if isinstance(each, ChannelProposer))
    curves = ranks.curves()
    (remover,) = channels._removers.values()
    of_ranks = sum(decision.error or 0.0 for decision in plan.decisions)
    if remover is None or not plan.channels:
        return 0.0, of_ranks
    forms = [form.at_multiples(1) for form in channels.basis.families if isinstance(form, Decomposition)]
    narrowed = remover.narrowed.get((*plan.channels, *forms, False))
    return remover.errors(plan, curves), of_ranks * (1.0 if narrowed is None else narrowed.unit / curves.unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*SAMPLES, []], default=[])
    parser.add_argument("--params", type=float, nargs="*", default=[])
    parser.add_argument("--macs", type=float, nargs="*", default=[])
    parser.add_argument("--judge", action="store_true", help="carry out every plan on all samples, and judge it")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budgets = [rf.Budget(params=share) for share in options.params] + [rf.Budget(macs=share) for share in options.macs]
    for name in options.networks or ["resnet20"]:
        network = NETWORKS[name]()
        data = network.calibration(SAMPLES[name], 0)
        session = rf.prepare(network.model, data)
        proposers, trials = session.proposers, session.trials
        rows: list[tuple[float, float, float]] = []
        for budget in budgets or [rf.Budget(params=0.5)]:
            asked = Asked(budget, None, rf.Lockstep(), trials.score)
            plans: dict[str, Plan] = {}
            for proposer in proposers:
                for proposal in proposer.proposals(asked):
                    try:
                        plans[proposal.name] = proposal.make()
                    except BudgetError as cause:
                        print(f"{name}  {budget}  {proposal.name}: {cause}", flush=True)
            scale = 1.0
            if SCALED in plans and (told := plans[SCALED].width_selector) is not None:
                scale = told.get("scale", 1.0)
            for label, plan in plans.items():
                start = time.perf_counter()
                of_channels, of_ranks = predicted(proposers, plan)
                measured = trials.score(plan)
                line = f"predicted {of_ranks:.4f} + {scale:.3g} x {of_channels:.4f}  measured {measured:.4f}"
                if math.isfinite(measured):
                    rows.append((of_ranks + of_channels, of_ranks + scale * of_channels, measured))
                if options.judge:
                    seen = rf.compare(network.original, trials.attempt(plan).model, network.test)
                    line += f"  top-1 {100 * (seen.top1 or (0, 0))[1]:.2f}  agreement {100 * (seen.agreement or 0):.2f}"
                print(f"{name}  {budget}  {label}: {line}  {time.perf_counter() - start:.0f} s", flush=True)
        for title, column in (("scale 1", 0), ("measured scale", 1)):
            found = spearmanr([row[column] for row in rows], [row[2] for row in rows]).statistic
            print(f"{name}: rank correlation of {len(rows)} plans, {title}: {found:.3f}", flush=True)


if __name__ == "__main__":
    main()

"""What plans are predicted to cost at the network's output, against what they do on photographs that nobody fitted on.

    python -m benchmarks.predicted [--samples 100 250] [--threads 2]

Twenty plans of MobileNetV1, low rank alone, without repair: `Lagrangian` and `Uniform` at ten budgets. Predicted is the
sum of the curves' errors, true the squared change of the outputs on 250 other photographs; both are sums over the
output, centred over the classes, on one scale. Where errors add up and samples are many the ratio is 1.
"""

from __future__ import annotations

import argparse

import torch
from scipy.stats import spearmanr

import rankfold as rf
from benchmarks.networks import mobilenet
from rankfold.data.splits import Split

KEPT = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 250])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = mobilenet()
    images = torch.cat([batch for batch, _ in network.test])
    families = [rf.WhitenedSVD()]

    @torch.no_grad()
    def outputs(model: torch.nn.Module) -> torch.Tensor:
        logits = torch.cat([model(part) for part in images.split(50)]).double()
        return logits - logits.mean(1, keepdim=True)

    expected = outputs(network.model)
    for samples in options.samples:
        data = list(Split(network.calibration(samples, 0), 5, held_out=False))
        sites = rf.find_sites(network.model, data[0])
        stats = rf.collect(network.model, data, sites=sites, positions=64, enough=24)
        rf.collect_gradients(network.model, data, stats, sites=sites)
        curves = rf.measure(network.model, stats, sites=sites, families=families)
        energies = {curve.site.path: curve.energy for curve in curves}
        scale = sum(energies.values()) / len(energies)  # by which `measure` divides
        predicted, true, rows = [], [], []
        for selector in (rf.Lagrangian(), rf.Uniform()):
            for kept in KEPT:
                try:
                    plan = rf.make_plan(curves, budget=rf.Budget(params=kept), selector=selector)
                except rf.RankfoldError:
                    continue
                chosen = {
                    (curve.site.path, rank): e
                    for curve in curves
                    for rank, e in zip(curve.ranks, curve.errors, strict=True)
                }
                cost = scale * sum(chosen[each.site, each.rank] for each in plan.changes)  # type: ignore[misc]
                small = rf.apply(network.model, plan, stats=stats)
                loss = float((outputs(small) - expected).square().sum(1).mean())
                predicted.append(cost)
                true.append(loss)
                rows.append(f"    {type(selector).__name__:<11} {kept:<5} predicted {cost:9.2f}  true {loss:9.2f}")
        ratios = sorted(t / p for t, p in zip(true, predicted, strict=True))
        print(
            f"{samples} photographs, {len(true)} plans: rank correlation {spearmanr(predicted, true).statistic:.3f}, "
            f"true over predicted {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}",
            flush=True,
        )
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()

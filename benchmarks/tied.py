"""One table for embedding and head: stories260k with nothing but its table factorised, chosen for one end or for both.

    python -m benchmarks.tied [--ranks 56 48 40] [--threads 1]

Perplexity over the first 100 stories, calibrated on the others, without repair. "Vectors alone" chooses what is kept by
the vectors that are looked up, "both ends" by their gradients and the head's inputs and gradients as well.
"""

from __future__ import annotations

import argparse

import torch

import rankfold as rf
from benchmarks.networks import data_folder
from benchmarks.stories import LENGTH, TESTED, load, perplexity, stories
from rankfold.statistics.gradients import collect_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[56, 48, 40])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = data_folder() / "stories260k"
    texts, model = stories(folder), load(folder)
    model.config.use_cache = False
    longest = [text[:LENGTH] for text in texts[TESTED:] if len(text) >= LENGTH]
    data = [{"input_ids": part} for part in torch.stack(longest).split(16)]
    sites = rf.find_sites(model, data[0])
    table = sites.at("lm_head")
    statistics = {name: rf.collect(model, data, sites=sites) for name in ("vectors alone", "both ends")}
    collect_gradients(model, data, statistics["both ends"], sites=sites)
    print(f"dense: perplexity {perplexity(model, texts[:TESTED]):.3f}")
    for rank in options.ranks:
        decisions = tuple(
            rf.Decision(site.path, rf.WhitenedSVD(), rank) if site is table else rf.Decision(site.path)
            for site in sites
        )
        plan = rf.Plan(decisions, sites.skips, sites.fingerprint)
        for name, stats in statistics.items():
            small = rf.apply(model, plan, stats=stats)
            print(f"rank {rank} of 64, {name}: perplexity {perplexity(small, texts[:TESTED]):.3f}", flush=True)


if __name__ == "__main__":
    main()

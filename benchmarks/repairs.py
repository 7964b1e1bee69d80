"""Options of the repair: one plan, carried out with several.

    python -m benchmarks.repairs [mobilenet_v1 resnet20 resnet56 minilm] [--samples N…] [--kept SHARE] [--seeds 3]
        [--anchors 1 0.5 …] [--activation 0 2 …]

The plan is that of `Lagrangian()` at `--kept` of the parameters (for MiniLM, of its encoder's; tables stay) or, with
`--default`, the one that `compress` takes by itself. Image networks are judged by agreement and top-1 on images they
were not calibrated on, MiniLM by the mean cosine of sentence embeddings. `none` is the plan without a repair,
`activation N` fits so often to targets past the activation, and the others do as by default. Each line says how many
layers the repair changed: where the guard takes hardly any, the figures say nothing about repairs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks.few_samples import Task, photographs, sentences
from rankfold.plan import Plan
from rankfold.registry import to_json

SAMPLES = {"mobilenet_v1": (250,), "resnet20": (100, 250), "resnet56": (1024,), "minilm": (64, 128)}
KEPT = {"mobilenet_v1": 0.7, "resnet20": 0.5, "resnet56": 0.2, "minilm": 0.7}


def carried_out(task: Task, plan: Plan, batches: list[Any], repair: rf.Lockstep | None) -> nn.Module:
    """The result of a plan that is carried out with another repair."""
    named = None if repair is None else to_json(repair)
    return rf.apply(task.model, replace(plan, repair=named), batches)


def changed(model: nn.Module, plain: nn.Module, plan: Plan) -> int:
    """Number of layers of the plan with another weight or bias than without a repair."""
    mine, theirs = model.state_dict(), plain.state_dict()
    other = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    return sum(any(name.startswith(f"{each.site}.") for name in other) for each in plan.decisions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*SAMPLES, []], default=[])
    parser.add_argument("--samples", type=int, nargs="+")
    parser.add_argument("--anchors", type=float, nargs="*", default=[])
    parser.add_argument("--activation", type=int, nargs="*", default=[], help="0 fits the outputs themselves")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds, from 0")
    parser.add_argument("--kept", type=float)
    parser.add_argument("--default", action="store_true", help="the plan that compress takes by itself")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen: dict[str, Any] = {} if options.default else {"selector": rf.Lagrangian()}
    ways: dict[str, rf.Lockstep | None] = {"none": None}
    ways |= {f"anchor {anchor:g}": rf.Lockstep(anchor=anchor) for anchor in options.anchors}
    ways |= {f"activation {times}": rf.Lockstep(activation=times) for times in options.activation}
    for name in options.networks or SAMPLES:
        for samples in options.samples or SAMPLES[name]:
            for seed in range(options.seeds):
                task = sentences(seed) if name == "minilm" else photographs(name, seed)
                batches, start = task.draw(samples), time.perf_counter()
                budget = task.budget("params", options.kept or KEPT[name])
                spared = ("embeddings.*",) if name == "minilm" else ()
                out = rf.compress(task.model, batches, budget=budget, seed=seed, exclude=spared, **chosen)
                plan, plain = out.plan, None
                print(f"{name} {samples} samples, seed {seed}: plan in {time.perf_counter() - start:.0f} s", flush=True)
                for label, repair in ways.items():
                    model = carried_out(task, plan, batches, repair)
                    plain = model if plain is None else plain
                    others = f"{changed(model, plain, plan)} of {len(plan.decisions)} layers changed by the repair"
                    print(f"    {label:<14}{task.judge(model)}  {others}", flush=True)


if __name__ == "__main__":
    main()

"""Few samples: what 32 to 512 unlabelled inputs are enough for.

    python -m benchmarks.few_samples [mobilenet_v1 mobilenet_v2 minilm] [--samples N…] [--ways default whitened …]

MobileNetV1 and V2 are calibrated on photographs and judged on 250 others (agreement, top-1), MiniLM-L6 on sentences of
WikiText and judged on 300 others (mean cosine of the sentence embeddings). Sizes are shares of the parameters (or
MACs); for MiniLM of its encoder's, since embeddings stay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import rankfold as rf
from benchmarks import encoder
from benchmarks.networks import NETWORKS

SAMPLES = {"mobilenet_v1": (50, 100, 250), "mobilenet_v2": (250,), "minilm": (32, 128, 512)}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "whitened": {"families": [rf.WhitenedSVD()]},
    "whitened, no repair": {"families": [rf.WhitenedSVD()], "repair": None},
    "channels": {"families": [rf.Interpolative()]},
}


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        model: The network.
        draw: Number of samples to calibration batches.
        judge: Compressed model to one line of figures.
        budget: Resource and kept share to a budget.
        spared: Layers that stay as they are.
    """

    model: nn.Module
    draw: Callable[[int], list[Any]]
    judge: Callable[[nn.Module], str]
    budget: Callable[[str, float], rf.Budget]
    spared: tuple[str, ...] = ()


def photographs(name: str, seed: int) -> Task:
    """A network for photographs."""
    network = NETWORKS[name]()

    def judge(model: nn.Module) -> str:
        seen = rf.compare(network.original, model, network.test)
        dense, small = seen.top1 or (0.0, 0.0)
        return f"top-1 {dense:.3f} -> {small:.3f}  agreement {seen.agreement:.3f}"

    return Task(
        network.model,
        lambda samples: network.calibration(samples, seed),
        judge,
        lambda resource, kept: rf.Budget(**{resource: kept}),
    )


def sentences(seed: int) -> Task:
    """MiniLM-L6; `seed` rotates the sentences it is calibrated on."""
    tokenizer, model = encoder.encoder()
    test = encoder.batches(tokenizer, encoder.sentences("test", 300))
    expected = encoder.embeddings(model, test)
    whole, inner = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))

    def draw(samples: int) -> list[Any]:
        texts = encoder.sentences("valid", samples * (seed + 1))
        return encoder.batches(tokenizer, texts[seed :: seed + 1][:samples], size=32)

    def judge(small: nn.Module) -> str:
        return f"mean cosine {float((encoder.embeddings(small, test) * expected).sum(-1).mean()):.4f}"

    def budget(resource: str, kept: float) -> rf.Budget:
        return rf.Budget(**{resource: int(whole - inner * (1 - kept))})

    return Task(model, draw, judge, budget, ("embeddings.*",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*SAMPLES, []], default=[])
    parser.add_argument("--samples", type=int, nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["default", "whitened", "whitened, no repair"])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7])
    parser.add_argument("--resource", choices=("params", "macs"), default="params")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print the notes and warnings of each report")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks or SAMPLES:
        task = sentences(options.seed) if name == "minilm" else photographs(name, options.seed)
        for samples in options.samples or SAMPLES[name]:
            for kept in options.kept:
                for way in options.ways:
                    start = time.perf_counter()
                    budget = task.budget(options.resource, kept)
                    out = rf.compress(
                        task.model,
                        task.draw(samples),
                        budget=budget,
                        exclude=task.spared,
                        seed=options.seed,
                        **WAYS[way],
                    )
                    taken = next((each.selector for each in out.report.candidates if each.taken), "the only plan")
                    print(
                        f"{name:<13}{samples:>4} samples  {options.resource} {kept}  {way:<20}"
                        f"{task.judge(out.model)}  by {taken}  {time.perf_counter() - start:.0f} s",
                        flush=True,
                    )
                    if options.report:
                        for line in (
                            *out.report.notes,
                            *out.report.details,
                            *(f"WARNING: {text}" for text in out.report.warnings),
                        ):
                            print(f"    {line[:400]}", flush=True)


if __name__ == "__main__":
    main()

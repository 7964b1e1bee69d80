"""stories260k, a trained Llama: neurons and key/value groups removed, saved as an ordinary Hugging Face directory.

    python -m benchmarks.stories [--kept 0.8] [--threads 1]

The directory is loaded in a process in which rankfold cannot be imported, and its perplexity there over the first 100
stories is compared with that of the compressed model in memory. Calibrated on the other stories.
"""

from __future__ import annotations

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TESTED = 100
LONGEST = 512
LENGTH = 128  # tokens of a calibration story


def stories(folder: Path) -> list[Tensor]:
    """Token ids of every story."""
    held = np.load(folder / "stories.npz")
    tokens, offsets = torch.from_numpy(held["tokens"].astype(np.int64)), held["offsets"].tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(offsets)]


def load(folder: Path) -> Any:
    """A language model from a Hugging Face directory. No torchvision is needed, and one that fails is kept away."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def perplexity(model: nn.Module, texts: list[Tensor]) -> float:
    """`exp` of the mean negative log-likelihood of every token but the first of each story."""
    total, count = 0.0, 0
    for text in texts:
        ids = text[:LONGEST]
        logits = model(ids[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "STORIES"), help="only print a directory's perplexity")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure is not None:
        sys.modules["rankfold"] = None  # type: ignore[assignment]
        model, folder = (Path(each) for each in options.measure)
        print(repr(perplexity(load(model), stories(folder)[:TESTED])))
        return 0
    return compress(options.kept, options.threads)


def compress(kept: float, threads: int) -> int:
    """Compress, save, and measure on both sides."""
    import rankfold as rf
    from benchmarks.networks import data_folder

    folder = data_folder() / "stories260k"
    texts, model = stories(folder), load(folder)
    model.config.use_cache = False
    longest = [text[:LENGTH] for text in texts[TESTED:] if len(text) >= LENGTH]
    data = [{"input_ids": part} for part in torch.stack(longest).split(16)]
    out = rf.compress(model, data, budget=rf.Budget(params=kept), families=[rf.Interpolative(uniform=True)])
    for group in out.plan.channels:
        print(f"{group.group}: {len(group.kept)} of {group.units}")
    before, after = out.report.before.params, out.report.after.params
    print(f"kept {after / before:.4f} of {before} parameters, latency {out.report.latency:.2f}")
    print(f"perplexity dense {perplexity(model, texts[:TESTED]):.4f}")
    here = perplexity(out.model, texts[:TESTED])
    with tempfile.TemporaryDirectory() as scratch:
        rf.save_pretrained(out, Path(scratch) / "small")
        measure = ["--measure", str(Path(scratch) / "small"), str(folder), "--threads", str(threads)]
        done = subprocess.run([sys.executable, __file__, *measure], check=True, capture_output=True, text=True)
    there = float(done.stdout)
    print(f"perplexity in memory {here!r}\nperplexity loaded where rankfold cannot be imported {there!r}")
    return 0 if math.isclose(here, there, rel_tol=1e-6) else 1


if __name__ == "__main__":
    raise SystemExit(main())

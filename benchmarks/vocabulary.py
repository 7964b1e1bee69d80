"""Peak memory of a compression whose outputs are far larger than everything else: a vocabulary of 128,000."""

from __future__ import annotations

import argparse
import resource

import torch

import rankfold as rf
from benchmarks.zoo import import_torchvision


def network(vocabulary: int) -> torch.nn.Module:
    """A Llama of two layers with random weights; its head is most of it."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def peak() -> float:
    """Most memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    args = parser.parse_args()
    model = network(args.vocabulary)
    draw = torch.Generator().manual_seed(0)
    shape = (args.samples, args.length)
    tokens = torch.randint(args.vocabulary, shape, generator=draw)
    data = [{"input_ids": part} for part in tokens.split(args.batch)]
    logits = args.samples * args.length * args.vocabulary * 4 / 2**30
    start = peak()
    print(f"model and data {start:.2f} GB; logits of all samples, one network: {logits:.2f} GB", flush=True)
    out = rf.compress(model, data, budget=rf.Budget(macs=0.96), families=[rf.WhitenedSVD()], selector=rf.Lagrangian())
    print(out.report)
    print(f"peak {peak():.2f} GB: {peak() - start:.2f} above model and data")


if __name__ == "__main__":
    main()

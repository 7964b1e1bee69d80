"""How large the plan of a large language model is: `python -m benchmarks.plan_size [--layers 32] [--kept 0.5]`.

A Llama of 7 billion parameters with half of the neurons of every block removed, at random: the worst case, since
neighbours that stay together are written together. The plan is made without weights, and read back.
"""

from __future__ import annotations

import argparse
import time

import torch

from rankfold.plan import ChannelDecision, Decision, Plan
from rankfold.sites.site import Skip

NEURONS = 11008
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CUT = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}


def large(layers: int, kept: float) -> Plan:
    """The plan."""
    draw = torch.Generator().manual_seed(0)
    decisions, channels = [], []
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        chosen = torch.randperm(NEURONS, generator=draw)[: int(NEURONS * kept)].sort().values
        stays = tuple(chosen.tolist())
        decisions += [Decision(f"{prefix}{name}", why="dense: on the channels it has left") for name in LINEARS]
        decisions += [Decision(f"{prefix}{name}", why="dense: on the channels it has left") for name in CUT]
        channels.append(ChannelDecision(f"{prefix}mlp.gate_proj", NEURONS, stays, "width by same-share"))
        cuts |= {f"{prefix}{name}.weight": {axis: stays} for name, axis in CUT.items()}
    skips = (Skip("model.embed_tokens", "unsupported: Embedding"),)
    return Plan(tuple(decisions), skips, "0" * 64, "LlamaForCausalLM", channels=tuple(channels), cuts=cuts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kept", type=float, default=0.5)
    options = parser.parse_args()
    plan = large(options.layers, options.kept)
    start = time.perf_counter()
    text = plan.to_json()
    wrote = time.perf_counter()
    same = Plan.from_json(text).cuts == plan.cuts
    read = time.perf_counter() - wrote
    print(
        f"{options.layers} blocks, {options.kept} of {NEURONS} neurons kept: {text.count(chr(10)):,} lines, "
        f"{len(text.encode()) / 2**20:.2f} MB, read back {'equal' if same else 'DIFFERENT'}; reading takes "
        f"{read / max(wrote - start, 1e-9):.1f} of writing"
    )


if __name__ == "__main__":
    main()

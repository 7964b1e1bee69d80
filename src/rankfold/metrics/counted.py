"""Cost by counting on the live module; tests demand that it equals the formulas."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from rankfold.graph.trace import Batch, batch_size, device_of, evaluating, run, take, to_device
from rankfold.metrics.cost import Cost


def count_params(model: nn.Module) -> int:
    """Elements of all parameters; a shared one counts once, a lazy one without a shape not at all."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def count_bytes(model: nn.Module) -> int:
    """Bytes of the state dict (parameters and persistent buffers); one tensor under several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor) and not is_lazy(tensor):
            plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
            place = (tensor.data_ptr() if plain else 0) or -id(tensor)
            seen[place, tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def count_macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates per sample, as torch's own counter sees them (half its FLOPs).

    Matrix products of attention count too. The model runs once on one sample, or, where it cannot, on the batch. Fused
    kernels (attention, `nn.TransformerEncoderLayer`) that the counter cannot see into are switched off meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            samples = run_one(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // (2 * samples)


def run_one(model: nn.Module, example: Batch) -> int:
    """Run the model in eval mode on the first sample of a batch; where it refuses that, on the whole batch.

    Returns:
        How many samples were run.
    """
    example = to_device(example, device_of(model))
    with evaluating(model):
        try:
            run(model, take(example, torch.arange(1)))
            return 1
        except Exception:
            if batch_size(example) == 1:
                raise
        run(model, example)
        return batch_size(example)


def count(model: nn.Module, example: Batch) -> Cost:
    """All resources of a live model."""
    return Cost(count_params(model), count_macs(model, example), count_bytes(model))

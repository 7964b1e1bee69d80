"""Toy weights and moments, and the hard ones that every method has to survive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from rankfold.decompositions import Moments

SHAPES: tuple[tuple[int, ...], ...] = (
    (12, 20),
    (20, 12),
    (7, 1),
    (8, 6, 3),
    (8, 6, 3, 3),
    (6, 9, 3, 1),
    (9, 4, 2, 3),
    (4, 3, 2, 3, 2),
)
"""Canonical shapes: linear, linear with one input, and 1-d to 3-d kernels, some longer than wide."""


def normal(*shape: int, seed: int, device: str = "cpu") -> Tensor:
    """Standard normal numbers in float64, drawn on the CPU without touching the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def toy_weight(shape: Sequence[int], *, seed: int = 0, device: str = "cpu") -> Tensor:
    """A canonical weight of a trained layer's kind: a few strong directions, and a tail."""
    count = min(shape[0], prod(shape[1:]))
    return _with_spectrum(shape, 1 / torch.arange(1, count + 1, dtype=torch.float64), seed, device)


def _with_spectrum(shape: Sequence[int], spectrum: Tensor, seed: int, device: str) -> Tensor:
    """A weight whose unfolding has given singular values and drawn singular vectors."""
    u, _, vh = torch.linalg.svd(normal(shape[0], prod(shape[1:]), seed=seed), full_matrices=False)
    flat: Tensor = (u * spectrum) @ vh
    return flat.reshape(list(shape)).to(device)


def _rank_one(shape: Sequence[int], device: str) -> Tensor:
    rows, columns = normal(shape[0], 1, seed=1, device=device), normal(1, prod(shape[1:]), seed=2, device=device)
    return (rows @ columns).reshape(list(shape))


def _ill_conditioned(shape: Sequence[int], device: str) -> Tensor:
    count = min(shape[0], prod(shape[1:]))
    return _with_spectrum(shape, torch.logspace(0, -14, count, dtype=torch.float64), 3, device)


def _one_channel(shape: Sequence[int], device: str) -> Tensor:
    weight = torch.zeros(*shape, dtype=torch.float64, device=device)
    weight[:, 0] = normal(*weight[:, 0].shape, seed=4, device=device)
    return weight


_WEIGHTS: dict[str, Callable[[Sequence[int], str], Tensor]] = {
    "zero": lambda shape, device: torch.zeros(*shape, dtype=torch.float64, device=device),
    "rank-one": _rank_one,
    "one-channel": _one_channel,
    "1e20": lambda shape, device: toy_weight(shape, device=device) * 1e20,
    "1e-20": lambda shape, device: toy_weight(shape, device=device) * 1e-20,
    "half": lambda shape, device: toy_weight(shape, device=device).half(),
    "bfloat16": lambda shape, device: toy_weight(shape, device=device).bfloat16(),
    "flat": lambda shape, device: toy_weight((2, 5 * shape[1], *shape[2:]), device=device),
    "ill-conditioned": _ill_conditioned,
}

HARD_WEIGHTS: tuple[str, ...] = tuple(_WEIGHTS)
"""Names of the hard weights."""


def hard_weight(name: str, shape: Sequence[int], *, device: str = "cpu") -> Tensor:
    """A hard canonical weight.

    Args:
        name: Name of the weight, one of `HARD_WEIGHTS`.
        shape: Canonical shape; "flat" takes only its kernel and a multiple of its inputs.
        device: Device of the weight.

    Returns:
        The weight in float64, but "half" and "bfloat16" in their dtypes.
    """
    return _WEIGHTS[name](shape, device)


MOMENTS: tuple[str, ...] = ("toy", "rank-deficient", "zero", "1e20", "1e-20", "ill-conditioned", "constant")
"""Names of the kinds of moments; "toy" is the easy one, "constant" has no covariance at all."""


def moments_of_weight(
    weight: Tensor, kind: str = "toy", *, bias: bool = False, seed: int = 5, positions: int | None = None
) -> Moments:
    """Moments of drawn inputs and of the outputs that a weight gives on them.

    Args:
        weight: Canonical weight, shape (out, in, kernel…).
        kind: Kind of the inputs, one of `MOMENTS`.
        bias: True if the layer has a bias, so that the covariance is the metric.
        seed: Seed of the inputs.
        positions: Number of inputs that are drawn; None is enough for a Gram of full rank.

    Returns:
        All moments of `Moments`, on the weight's device.
    """
    flat = weight.detach().double().flatten(1)
    n = flat.shape[1]
    inputs = _inputs(kind, positions or 3 * n + 20, n, seed).to(flat.device)
    outputs = inputs @ flat.mT
    count = len(inputs)
    gradients = normal(4 * len(flat), len(flat), seed=seed + 1).to(flat)
    felt = (
        gradients.mT
        @ gradients
        / len(gradients)
        * torch.linspace(1, 3, len(flat)).to(flat).outer(torch.linspace(1, 3, len(flat)).to(flat))
    )
    output_gram = outputs.mT @ outputs / count
    return Moments(inputs.mT @ inputs / count, inputs.mean(0), output_gram, bias=bias, gradient_gram=felt)


def _inputs(kind: str, count: int, n: int, seed: int) -> Tensor:
    """Inputs of a kind, shape (count, n): correlated, with a mean."""
    drawn = normal(count, n, seed=seed)
    if kind == "zero":
        return torch.zeros_like(drawn)
    if kind == "constant":
        return drawn[:1].expand(count, n).contiguous()
    if kind == "rank-deficient":
        kept = max(1, n // 3)
        return drawn[:, :kept] @ normal(kept, n, seed=seed + 1)
    mixed = drawn @ normal(n, n, seed=seed + 1) / n**0.5 + normal(1, n, seed=seed + 2)
    if kind == "ill-conditioned":
        return drawn * torch.logspace(0, -8, n, dtype=torch.float64)
    scales = {"toy": 1.0, "1e20": 1e20, "1e-20": 1e-20}
    scaled: Tensor = mixed * scales[kind]
    return scaled

"""Gradients of the loss by the weights of all sites, for selectors that look at which way a cut moves the loss."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankfold.data.batches import Batch, batch_size, labels_of, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import DataError
from rankfold.layers import adapter_for
from rankfold.linalg.precision import widen
from rankfold.outputs.kinds import Logits
from rankfold.outputs.taken import Taken
from rankfold.sites.site import Site, Sites
from rankfold.statistics._base import Statistic
from rankfold.statistics._loss_gradient import LossGradient
from rankfold.statistics.store import Statistics


def add_loss_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parts: Iterable[Batch],
    stats: Statistics,
    sites: Sites,
    taken: Taken,
) -> list[Statistic]:
    """Add a `LossGradient` to the statistics of every site.

    The loss is the cross-entropy of the labels that come with the data or, without any, of the network's own decisions.

    Args:
        model: The model.
        modules: Its modules by path.
        parts: Samples that run at once.
        stats: Statistics of the model, changed.
        sites: Sites of the model.
        taken: Kinds of the outputs.

    Returns:
        The statistics that were added, of the samples of this process.

    Raises:
        DataError: No output is of the kind `Logits`.
    """
    place = next((i for i, kind in enumerate(taken.kinds.values()) if isinstance(kind, Logits)), None)
    if place is None:
        raise DataError(
            "outputs",
            law="scores of classes, whose cross-entropy has a gradient",
            got=", ".join(map(str, taken.kinds.values())) or "none",
            cure="pass outputs=rankfold.Logits() if they are, or choose another selector",
        )
    own = [site for site in sites if site.head is None and not site.fixed]
    weights = [_weight(modules[site.path]) for site in own]
    found = {site.path: LossGradient() for site in own}
    for site, weight in zip(own, weights, strict=True):
        found[site.path].add(_canonical(modules[site.path], site, torch.zeros_like(weight)), 0)
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for part in parts:
            gradients = _gradients(model, part, taken, place, weights)
            for site, gradient in zip(own, gradients, strict=True):
                found[site.path].add(_canonical(modules[site.path], site, gradient), batch_size(part))
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    for path, statistic in found.items():
        stats.sites[path][LossGradient.name] = statistic
    return list(found.values())


def _gradients(model: nn.Module, part: Batch, taken: Taken, place: int, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the summed loss on a batch; zero for a weight that it does not reach."""
    with evaluating(model), torch.enable_grad():
        logits = taken.of(run(model, to_device(part, device_of(model))))[place]
        rows = logits.reshape(-1, logits.shape[-1])
        labels = labels_of(part)
        known = labels is not None and labels.numel() == len(rows)
        wanted = labels.reshape(-1).to(rows.device) if known and labels is not None else rows.detach().argmax(-1)
        loss = nn.functional.cross_entropy(rows.float(), wanted, reduction="sum")
        gradients = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight


def _canonical(layer: nn.Module, site: Site, gradient: Tensor) -> Tensor:
    """A gradient in the shape of the canonical weight, groups × out × n."""
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{site.path} has no adapter")
    shadow = copy.copy(layer)
    shadow._parameters = {**layer._parameters, "weight": nn.Parameter(gradient, requires_grad=False)}
    return widen(adapter.canonical(shadow)).flatten(2).clone()

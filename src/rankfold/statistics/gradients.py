"""Two backward passes over a few samples: the Gauss–Newton Gram of every site's output, and its coherence."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.data.batches import Batch, batch_size, to_device
from rankfold.data.draws import generator
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import no_batch
from rankfold.distributed import ALONE, World
from rankfold.errors import NumericsError, is_out_of_memory
from rankfold.layers import adapter_for
from rankfold.layers.calls import input_of, rows_of
from rankfold.layers.splitting import split_at
from rankfold.outputs.taken import Output, Outputs, Taken, first_samples, outputs_to_json, settled
from rankfold.progress import Progress, silent
from rankfold.sites.models import check_module
from rankfold.sites.site import Site, Sites
from rankfold.statistics._coherence import Coherence
from rankfold.statistics._gradients import GradientGram
from rankfold.statistics.coherence import Followed, add_samples
from rankfold.statistics.collect import labels_of_rows, of_rows, sum_up
from rankfold.statistics.loss_gradients import add_loss_gradients
from rankfold.statistics.store import Statistics

SAMPLES = 256  # samples looked at; one probe each
BATCH = 32  # samples in memory at once


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    stats: Statistics,
    *,
    sites: Sites,
    samples: int = SAMPLES,
    outputs: Outputs | Taken = None,
    seed: int = 0,
    progress: Progress = silent,
    loss: bool = False,
    world: World = ALONE,
) -> str | None:
    """Add a `GradientGram` to the statistics of every site.

    For each sample a random direction `v` in the output is drawn, by the kind of the output (centred over the classes
    of logits, since a shift of all changes nothing; orthogonal to an embedding, which counts by its direction), and
    `⟨v, output⟩` is differentiated by every site's output. Every floating tensor of a nested output counts; of several
    tensors each is divided by its size, so that their relative errors are weighted. No gradient of a parameter is
    computed. The model is left as it was.

    A second backward pass, in other directions, follows the errors of every rank to the outputs, and adds a
    `Coherence`: see `rankfold.statistics.coherence`.

    A site that no gradient reaches (such as one before an arg-max), while gradients reach others, is weighted evenly,
    so that its output counts as much as that of the others does in the median; the manifest names it under "unreached".

    Args:
        model: The model.
        batches: Calibration inputs; the first `samples` of them are used.
        stats: Statistics of the same model; changed.
        sites: Sites of the model.
        samples: Number of samples.
        outputs: Kinds of the outputs; None guesses by the first 32 samples (`rankfold.outputs.taken.settle`).
        seed: Seed of the directions.
        progress: Callback for every batch.
        loss: True to add a `LossGradient` too, for selectors that read "changes".
        world: The processes that share the samples; all get the sums.

    Returns:
        None, or the reason why this model cannot be differentiated; then no site has a Gram.

    Raises:
        NumericsError: A gradient is not finite; the site is named.
        DataError: There is no batch, or an output is not of the kind that was given.
        OptionError: `outputs` is no kind of output, nor a dict of kinds by name.
    """
    model = split_at(check_module(model), sites.split)
    modules = dict(model.named_modules(remove_duplicate=False))
    parts_of_sites = [part for site in sites for part in site.parts]
    grams = {site.path: GradientGram() for site in parts_of_sites}
    energies = {site.path: torch.zeros(2, dtype=torch.float64) for site in parts_of_sites}
    device = device_of(model)
    at_once = sites.graph.at_once(BATCH)
    taken = settled(model, batches, outputs, at_once)
    parts, start = [], 0
    for number, part in enumerate(first_samples(batches, samples, at_once)):
        if world.owns(number):
            parts.append((number, start, part))
        start += batch_size(part)
    if not parts and world.size == 1:
        raise no_batch()
    why: str | None = None
    with progress("gradients", 2 * len(parts)) as advance:
        for number, start, part in parts:
            try:
                reached, gradients = _differentiated(model, modules, sites, part, taken, generator(seed, number))
            except RuntimeError as cause:
                if is_out_of_memory(cause):
                    raise
                why = f"the outputs cannot be differentiated ({str(cause).splitlines()[0][:160]})"
                break
            _add(grams, reached, gradients, torch.arange(start, start + batch_size(part)) % 2 == 0)
            for site, _, value in reached:
                energies[site.path] += torch.tensor([float(value.detach().double().square().sum()), value.numel()])
            advance()
        if parts:
            _forget(model, parts[-1][2], device)
        failed = torch.tensor([float(why is not None)])
        world.sum_([failed])
        if bool(failed > 0):
            return why or "the outputs cannot be differentiated in another process"
        sum_up(list(grams.values()), device, world)
        world.sum_(list(energies.values()))
        blind = _weight_evenly(grams, {path: float(e[0] / e[1].clamp_min(1)) for path, e in energies.items()})
        for path, statistic in grams.items():
            stats.sites[path][GradientGram.name] = statistic
        followed = {
            site.path: own
            for site in sites
            if site.head is None
            and site.path not in blind
            and (own := Followed.of(site, modules[site.path], stats)) is not None
        }
        for number, _, part in parts:
            if followed:
                draw = generator(seed, number, 1)  # directions that nothing was fitted to
                reached, gradients = _differentiated(model, modules, sites, part, taken, draw)
                add_samples(followed, reached, gradients, batch_size(part))
            advance()
    if parts:
        _forget(model, parts[-1][2], device)
    coherences = {path: own.statistic() for path, own in followed.items()}
    sum_up(list(coherences.values()), device, world)
    for path, coherence in coherences.items():
        if coherence.count:
            stats.sites[path][Coherence.name] = coherence
    stats.manifest["gradient_samples"] = samples
    if loss:
        labelled = enumerate(first_samples(batches, samples, at_once, labels=True))
        mine = (part for number, part in labelled if world.owns(number))
        sum_up(add_loss_gradients(model, modules, mine, stats, sites, taken), device, world)
    if taken.asked is not None:
        stats.manifest["outputs"] = outputs_to_json(taken.asked)
    if blind:
        stats.manifest["unreached"] = blind
    return None


_Reached = list[tuple[Site, nn.Module, Tensor]]  # a site, its layer, its output; of a head its input


def _differentiated(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sites: Sites,
    part: Batch,
    taken: Taken,
    draw: torch.Generator,
) -> tuple[_Reached, list[Tensor | None]]:
    """Every call of a site on a batch, and the gradient of one random projection of the outputs there."""
    seen: _Reached = []
    handles = [modules[site.path].register_forward_hook(_watch(site, seen)) for site in sites]
    heads = [site.head for site in sites if site.head is not None]
    handles += [
        modules[head.path].register_forward_pre_hook(_watch_input(head, seen), with_kwargs=True) for head in heads
    ]
    try:
        with evaluating(model), torch.enable_grad():
            returned = taken.of(run(model, to_device(part, device_of(model))))
            reached = list(seen)  # a checkpoint in the model runs its layers again on the way back
            projected = _projected(returned, list(taken.kinds.values()), draw)
            values = [value for *_, value in reached]
            return reached, list(torch.autograd.grad(projected, values, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()


def _projected(outputs: Sequence[Tensor], kinds: Sequence[Output], draw: torch.Generator) -> Tensor:
    """`Σ ⟨v, output⟩` over the outputs, `v` drawn by the kind of each; if several, each is divided by its size."""
    products = []
    for output, kind in zip(outputs, kinds, strict=True):
        here = output.detach()
        direction = kind.direction(here, torch.randn(output.shape, generator=draw, dtype=torch.float32).to(output))
        if len(outputs) > 1:
            direction = direction / kind.size(here).clamp_min(torch.finfo(output.dtype).tiny)
        products.append((output * direction).sum())
    return torch.stack([product.to(products[0]) for product in products]).sum()


def _weight_evenly(grams: dict[str, GradientGram], sizes: dict[str, float]) -> list[str]:
    """Give sites without a gradient a multiple of the identity that weighs their output as the others' in the median.

    Args:
        grams: Grams by path; changed.
        sizes: Mean square of an output entry of each site.

    Returns:
        The paths of those sites.
    """
    weights = {
        path: float(gram.mean().diagonal(dim1=1, dim2=2).sum()) * sizes[path]
        for path, gram in grams.items()
        if gram.total is not None
    }
    seen = [weight for weight in weights.values() if weight > 0]
    blind = [path for path, weight in weights.items() if not weight > 0]
    if not seen:
        return []  # no gradient is known: all sites are left as they are
    for path in blind:
        total = grams[path].total
        if total is None or not sizes[path] > 0:
            continue
        entries = total.shape[0] * total.shape[1]
        level = statistics.median(seen) / (sizes[path] * entries)
        eye = torch.eye(total.shape[1]).to(total).expand(total.shape)
        grams[path].total = eye * (level * max(grams[path].count, 1))
        if grams[path].first is not None:
            grams[path].first = eye * (level * grams[path].first_count)
    return blind


def _forget(model: nn.Module, part: Batch, device: torch.device) -> None:
    """Run once more without gradients where the model keeps a tensor with a history: such a model cannot be copied."""
    kept = (value for module in model.modules() for value in vars(module).values())
    if any(isinstance(value, Tensor) and value.grad_fn is not None for value in kept):
        with evaluating(model), torch.no_grad():
            run(model, to_device(part, device))


def _watch(site: Site, seen: _Reached) -> Any:
    """A hook that keeps a layer's output for differentiation and hands on a copy, which may be written into."""

    def hook(layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        value = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((site, layer, value))
        return value.clone()

    return hook


def _watch_input(site: Site, seen: _Reached) -> Any:
    """A hook that keeps the input of a head: with its table `E` the gradient there is `Eᵀ g`, as wide as a vector."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = input_of(args, kwargs)
        value = given if given.requires_grad else given.detach().requires_grad_()
        seen.append((site, layer, value))
        return (value.clone(),), {}  # a site is called with one tensor alone

    return hook


def _add(
    grams: dict[str, GradientGram],
    seen: _Reached,
    gradients: Sequence[Tensor | None],
    halves: Tensor,
) -> None:
    """Add a batch; `halves` is True for its samples of the first half, which is every other one of the whole data."""
    counted: set[str] = set()
    for (site, layer, value), gradient in zip(seen, gradients, strict=True):
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{site.path} has no adapter")
        rows = adapter.outputs(layer, torch.zeros_like(value) if gradient is None else gradient)
        labels = labels_of_rows(halves, rows_of(adapter, layer, value), site.rows).to(rows.device)
        for first in (True, False):
            chosen = labels == first
            if not bool(chosen.any()):
                continue
            own = of_rows(rows, chosen)
            total = grams[site.path].summand(own, own)
            if not bool(torch.isfinite(total).all()):
                raise NumericsError(
                    repr(site.path),
                    law="every gradient is finite",
                    got="NaN or infinity",
                    cure="pass weighting=False, or look at the layers behind this one",
                )
            count = int((halves == first).sum())
            grams[site.path].add(total, 0 if site.path in counted else count, first=first)
        counted.add(site.path)

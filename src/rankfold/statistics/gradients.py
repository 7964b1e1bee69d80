"""One backward pass over a few samples: the Gauss–Newton Gram of every site's output."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import NumericsError, is_out_of_memory
from rankfold.graph.sites import Site, Sites
from rankfold.graph.trace import Batch, batch_size, device_of, evaluating, run, take, to_device
from rankfold.layers import adapter_for
from rankfold.linalg.precision import work_dtype
from rankfold.metrics.compare import looks_like_logits, names_logits, output_tensors
from rankfold.progress import Progress, silent
from rankfold.statistics._gradients import GradientGram
from rankfold.statistics.data import no_batch
from rankfold.statistics.distributed import ALONE, World
from rankfold.statistics.draws import generator
from rankfold.statistics.store import Statistics

SAMPLES = 256  # samples looked at; one probe each
BATCH = 32  # samples in memory at once
SHIFT = 0.05  # of an output's variance that a common shift may carry where it counts as logits


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    stats: Statistics,
    *,
    sites: Sites,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress = silent,
    world: World = ALONE,
) -> str | None:
    """Add a `GradientGram` to the statistics of every site.

    For each sample a random direction `v` in the output is drawn (centred over classes where the output is logits,
    since a shift of all logits changes nothing; see `shifts`) and `⟨v, output⟩` is differentiated by every site's
    output. Of several output tensors each is divided by its norm, so that what is weighted is the relative error of
    each. No gradient of a parameter is computed. The model is left as it was.

    A site that no gradient reaches (before an arg-max, say), while it reaches others, is weighted evenly, by so much
    that its output counts as that of the others does in the median; the manifest names it under "unreached".

    Args:
        model: The model.
        batches: Calibration inputs; the first `samples` of them are used.
        stats: Of the same model; changed.
        sites: Its sites.
        samples: How many samples.
        seed: Seed of the directions.
        progress: Told about every batch.
        world: The processes that share the samples; all get the sums.

    Returns:
        None, or the reason why this model cannot be differentiated; then no site has a Gram.

    Raises:
        NumericsError: A gradient is not finite; the site is named.
        DataError: There is no batch.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    grams = {site.path: GradientGram() for site in sites}
    energies = {site.path: torch.zeros(2, dtype=torch.float64) for site in sites}
    device = device_of(model)
    shifted = shifts(model, batches)
    parts = [(number, part) for number, part in enumerate(_first(batches, samples)) if world.owns(number)]
    if not parts and world.size == 1:
        raise no_batch()
    why: str | None = None
    with progress("gradients", len(parts)) as advance:
        for number, part in parts:
            seen: list[tuple[Site, nn.Module, Tensor]] = []
            handles = [modules[site.path].register_forward_hook(_watch(site, seen)) for site in sites]
            try:
                with evaluating(model), torch.enable_grad():
                    returned, _ = output_tensors(run(model, to_device(part, device)))
                    outputs = list(seen)  # a checkpoint in the model runs its layers again on the way back
                    gradients = torch.autograd.grad(
                        _projected(returned, shifted, generator(seed, number)),
                        [value for _, _, value in outputs],
                        allow_unused=True,
                    )
            except RuntimeError as cause:
                if is_out_of_memory(cause):
                    raise
                why = f"the outputs cannot be differentiated ({str(cause).splitlines()[0][:160]})"
                break
            finally:
                for handle in handles:
                    handle.remove()
            _add(grams, outputs, gradients, batch_size(part))
            for site, _, value in outputs:
                energies[site.path] += torch.tensor([float(value.detach().double().square().sum()), value.numel()])
            advance()
    if parts:
        _forget(model, parts[-1][1], device)
    failed = torch.tensor([float(why is not None)])
    world.sum_([failed])
    if bool(failed > 0):
        return why or "the outputs cannot be differentiated in another process"
    _sum_up([grams[site.path] for site in sites], sites, device, world)
    world.sum_(list(energies.values()))
    blind = _weight_evenly(grams, {path: float(e[0] / e[1].clamp_min(1)) for path, e in energies.items()})
    stats.manifest["gradient_samples"] = samples
    if blind:
        stats.manifest["unreached"] = blind
    for path, statistic in grams.items():
        stats.sites[path][GradientGram.name] = statistic
    return None


def shifts(model: nn.Module, batches: Iterable[Batch]) -> list[bool]:
    """For every output whether a shift of all its columns changes nothing, as it is with logits.

    That is so of an output named "logits"; and of one of two axes and several columns, unless the mean of a row carries
    more than a twentieth of the variance over samples: the gradient of a cross-entropy sums to zero over the classes,
    so it never asks for a shift, and the outputs of a regression do shift. Twenty columns or more of which each goes
    its own way count as logits in any case: their shift is one direction of many.

    Args:
        model: The model.
        batches: Calibration inputs; the first 32 samples are used.
    """
    rows: list[list[Tensor]] = []
    device, named = device_of(model), False
    with evaluating(model), torch.no_grad():
        for part in _first(batches, BATCH):
            output = run(model, to_device(part, device))
            named = names_logits(output)
            found, _ = output_tensors(output)
            rows += [[] for _ in found[len(rows) :]]
            for mine, value in zip(rows, found, strict=False):
                mine.append(value.double())
    return [named or _shifts(own) for own in rows]


def _shifts(rows: Sequence[Tensor]) -> bool:
    """Whether `C Σ_i m_i² ≤ 0.05 Σ_ij z_ij²`, z centred over samples, `m_i` its mean over the C columns of a row.

    Args:
        rows: Parts of one output, each (samples, C) where it looks like logits.
    """
    if not all(looks_like_logits(part) for part in rows):
        return False
    values = torch.cat(list(rows))
    centred = values - values.mean(0)
    together = centred.mean(1).square().sum() * centred.shape[1]
    return not float(together) > SHIFT * float(centred.square().sum())


def _projected(outputs: Sequence[Tensor], shifted: Sequence[bool], draw: torch.Generator) -> Tensor:
    """`Σ ⟨v, output⟩` over the outputs; of several, each divided by its norm."""
    products = []
    for output, logits in zip(outputs, shifted, strict=True):
        direction = torch.randn(output.shape, generator=draw, dtype=torch.float32).to(output)
        if logits:
            direction = direction - direction.mean(-1, keepdim=True)
        if len(outputs) > 1:
            direction = direction / output.detach().norm().clamp_min(torch.finfo(output.dtype).tiny)
        products.append((output * direction).sum())
    return torch.stack([product.to(products[0]) for product in products]).sum()


def _weight_evenly(grams: dict[str, GradientGram], sizes: dict[str, float]) -> list[str]:
    """Give sites without a gradient a multiple of the identity that weighs their output as the others' in the median.

    Args:
        grams: By path; changed.
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
        return []  # nothing is known of any: all are left as they are
    for path in blind:
        total = grams[path].total
        if total is None or not sizes[path] > 0:
            continue
        entries = total.shape[0] * total.shape[1]
        level = statistics.median(seen) / (sizes[path] * entries) * max(grams[path].count, 1)
        total.diagonal(dim1=1, dim2=2).add_(level)
    return blind


def _forget(model: nn.Module, part: Batch, device: torch.device) -> None:
    """Run once more without gradients where the model keeps a tensor with a history: such a model cannot be copied."""
    kept = (value for module in model.modules() for value in vars(module).values())
    if any(isinstance(value, Tensor) and value.grad_fn is not None for value in kept):
        with evaluating(model), torch.no_grad():
            run(model, to_device(part, device))


def _sum_up(grams: Sequence[GradientGram], sites: Sites, device: torch.device, world: World) -> None:
    """Sum over all processes; one without samples adds zeros."""
    if world.size == 1:
        return
    totals: list[Tensor] = []
    for gram, site in zip(grams, sites, strict=True):
        if gram.total is None:
            outputs = site.geometry.canonical_shape[0]
            gram.total = torch.zeros(site.geometry.groups, outputs, outputs, dtype=work_dtype(device), device=device)
        totals.append(gram.total)
    counts = torch.tensor([gram.count for gram in grams], dtype=torch.int64)
    world.sum_([counts, *totals])
    for count, gram in zip(counts.tolist(), grams, strict=True):
        gram.count = count


def _first(batches: Iterable[Batch], samples: int) -> Iterable[Batch]:
    left = samples
    for batch in batches:
        for chunk in torch.split(torch.arange(min(batch_size(batch), left)), BATCH):
            yield take(batch, chunk)
            left -= len(chunk)
        if left <= 0:
            return


def _watch(site: Site, seen: list[tuple[Site, nn.Module, Tensor]]) -> Any:
    """A hook that keeps a layer's output for differentiation and hands on a copy, which may be written into."""

    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((site, layer, value))
        return value.clone()

    return hook


def _add(
    grams: dict[str, GradientGram],
    seen: Sequence[tuple[Site, nn.Module, Tensor]],
    gradients: Sequence[Tensor | None],
    samples: int,
) -> None:
    counted: set[str] = set()
    for (site, layer, value), gradient in zip(seen, gradients, strict=True):
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{site.path} has no adapter")
        rows = adapter.outputs(layer, torch.zeros_like(value) if gradient is None else gradient)
        total = grams[site.path].summand(rows, rows)
        if not bool(torch.isfinite(total).all()):
            raise NumericsError(
                repr(site.path),
                law="every gradient is finite",
                got="NaN or infinity",
                cure="pass weighting=False, or look at the layers behind this one",
            )
        grams[site.path].add(total, 0 if site.path in counted else samples)
        counted.add(site.path)

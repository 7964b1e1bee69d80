"""One backward pass over a few samples: the Gauss–Newton Gram of every site's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import NumericsError
from rankfold.graph.sites import Site, Sites
from rankfold.graph.trace import Batch, batch_size, device_of, evaluating, run, take, to_device
from rankfold.layers import adapter_for
from rankfold.linalg.precision import work_dtype
from rankfold.metrics.compare import output_tensor
from rankfold.progress import Progress, silent
from rankfold.statistics._gradients import GradientGram
from rankfold.statistics.data import no_batch
from rankfold.statistics.distributed import ALONE, World
from rankfold.statistics.draws import generator
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
    seed: int = 0,
    progress: Progress = silent,
    world: World = ALONE,
) -> str | None:
    """Add a `GradientGram` to the statistics of every site.

    For each sample a random direction `v` in the output is drawn (centred over classes where the output is logits,
    since a shift of all logits changes nothing) and `⟨v, output⟩` is differentiated by every site's output. No
    gradient of a parameter is computed. The model is left as it was.

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
    device = device_of(model)
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
                    output, logits = output_tensor(run(model, to_device(part, device)))
                    outputs = list(seen)  # a checkpoint in the model runs its layers again on the way back
                    direction = torch.randn(output.shape, generator=generator(seed, number), dtype=torch.float32).to(
                        output
                    )
                    if logits:
                        direction = direction - direction.mean(-1, keepdim=True)
                    gradients = torch.autograd.grad(
                        (output * direction).sum(), [value for _, _, value in outputs], allow_unused=True
                    )
            except RuntimeError as cause:
                why = f"the outputs cannot be differentiated ({str(cause).splitlines()[0][:160]})"
                break
            finally:
                for handle in handles:
                    handle.remove()
            _add(grams, outputs, gradients, batch_size(part))
            advance()
    failed = torch.tensor([float(why is not None)])
    world.sum_([failed])
    if bool(failed > 0):
        return why or "the outputs cannot be differentiated in another process"
    _sum_up([grams[site.path] for site in sites], sites, device, world)
    stats.manifest["gradient_samples"] = samples
    for path, statistic in grams.items():
        stats.sites[path][GradientGram.name] = statistic
    return None


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

"""One forward pass over the data, with every site's statistics fed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.checks import check_count
from rankfold.data.batches import Batch, batch_size, micro_batches, to_device
from rankfold.data.draws import check_seed, enough_positions, generator
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import as_batches, digest, no_batch, numbered, sample_count
from rankfold.distributed import ALONE, World
from rankfold.errors import DataError, MemoryLimitError, NumericsError, TraceError, allocating
from rankfold.layers import Adapter, adapter_for, input_of
from rankfold.layers.calls import rows_of
from rankfold.linalg.precision import work_dtype
from rankfold.progress import Progress, Told, as_progress, silent
from rankfold.registry import lookup
from rankfold.sites.finding import check_sites
from rankfold.sites.site import Site, Sites
from rankfold.statistics._base import Statistic
from rankfold.statistics.size import CHUNK_BYTES, size_of
from rankfold.statistics.store import Statistics

PIECE = 128  # most samples run at once; positions are drawn anew for each piece


def collect(
    model: nn.Module,
    data: Any,
    *,
    sites: Sites,
    statistics: Sequence[str] = ("input-gram", "input-mean"),
    positions: int | None = None,
    enough: int | None = None,
    seed: int = 0,
    progress: Progress | Told = silent,
    world: World = ALONE,
) -> Statistics:
    """Run the model once over the data and sum up the statistics of each site.

    Patches of a convolution exist only in chunks of at most 64 MiB. The model runs in eval mode and is left as it was.

    Args:
        model: The model.
        data: A re-iterable of batches.
        sites: Sites from `find_sites`.
        statistics: Registered names of the statistics to keep.
        positions: Maximum number of positions of each sample to look at (pixels of a feature map, tokens of a
            sequence), drawn anew for each 128 samples at most; None looks at all.
        enough: Number of positions for each feature of a site that is enough: fewer than `positions` are drawn where
            all samples together still have this many, and 16,384 in all. That holds for a list of batches; the samples
            of a loader cannot be counted beforehand.
        seed: Seed of that draw.
        progress: Callback for every batch.
        world: The processes that share the data; all read it, each runs its share, all get the sums.

    Returns:
        The statistics, with a manifest of the data.

    Raises:
        ModelError: The model is no module, or has tensors on meta.
        SiteError: The sites are of another model.
        OptionError: An option outside its range, or of another kind.
        DataError: No data, or a batch that is none or empty.
        TraceError: The model does not run on a batch; the batch is named.
        NumericsError: Activations at a site that are not finite; the site and batch are named.
    """
    check_positions(positions)
    check_count("enough", enough, none=True, cure="try 24")
    check_seed(seed)
    progress = as_progress(progress)
    model = check_sites(model, sites)
    batches = as_batches(data)
    known = None if enough is None else sample_count(batches)

    def drawn(site: Site) -> int | None:
        if positions is None or enough is None or known is None:
            return positions
        return min(positions, enough_positions(site.geometry.features, enough, known))

    kinds = [cast(type[Statistic], lookup(name, Statistic)) for name in statistics]
    modules = dict(model.named_modules(remove_duplicate=False))
    collected = {site.path: {kind.name: kind() for kind in kinds} for site in sites}
    # of a head, whose outputs are as many as the table has rows, the inputs alone are looked at
    ends = {site.head.path: site.head for site in sites if site.head is not None}
    collected |= {path: {kind.name: kind() for kind in kinds if not kind.reads_outputs} for path in ends}
    feeders = [
        _Feeder(site, modules[site.path], list(collected[site.path].values()), drawn(site), (seed, index))
        for index, site in enumerate((*sites, *ends.values()))
        if collected[site.path]
    ]
    handles = [feeder.module.register_forward_hook(feeder, with_kwargs=True) for feeder in feeders] if kinds else []
    device, samples, looked_at, sha = device_of(model), 0, 0, hashlib.sha256()
    piece = 0
    try:
        with evaluating(model), progress("statistics", _length(batches)) as advance:
            for number, batch in numbered(batches):
                looked_at += 1
                seen, samples = samples, samples + batch_size(batch)
                sha.update(digest(batch))
                for part, rows in micro_batches(iter([batch]), sites.graph.at_once(PIECE)):
                    if world.owns(piece):
                        first = torch.arange(rows.start + seen, rows.stop + seen) % 2 == 0
                        for feeder in feeders:
                            feeder.begin(piece, first)
                        _forward(model, to_device(part, device), number)
                    piece += 1
                for feeder in feeders:
                    feeder.check(number)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    if samples == 0:
        raise no_batch()
    world.agree("calibration data", sha.hexdigest())
    sum_up([statistic for feeder in feeders for statistic in feeder.statistics], device, world)
    unseen = [feeder.site.path for feeder in feeders if feeder.statistics[0].count == 0]
    if unseen:
        raise DataError(
            repr(unseen[0]),
            law="every site is called on the calibration data",
            got="no call in any batch",
            cure="add data that reaches the layer, or exclude it",
        )
    manifest = {
        "samples": samples,
        "batches": looked_at,
        "sha256": sha.hexdigest(),
        "positions": positions,
        "enough": enough,
        "seed": seed,
    }
    return Statistics(collected, manifest, sites.fingerprint)


def check_positions(positions: int | None) -> None:
    """Refuse what is no number of positions.

    Raises:
        OptionError: `positions` is no int of at least 1, and not None.
    """
    check_count("positions", positions, none=True, cure="try 64")


def sum_up(statistics: Sequence[Statistic], device: torch.device, world: World) -> None:
    """Sum statistics over all processes; a process that saw no position of a site gets the shape from the others."""
    if world.size == 1 or not statistics:
        return
    shapes = torch.zeros(len(statistics), 8, dtype=torch.float64)
    for row, statistic in zip(shapes, statistics, strict=True):
        if statistic.total is not None:
            row[0] = statistic.total.ndim
            row[1 : 1 + statistic.total.ndim] = torch.tensor(statistic.total.shape)
    world.largest_([shapes])
    totals: list[Tensor] = []
    for row, statistic in zip(shapes.long().tolist(), statistics, strict=True):
        if row[0] and statistic.total is None:
            statistic.total = torch.zeros(row[1 : 1 + row[0]], dtype=work_dtype(device), device=device)
        if statistic.total is not None and statistic.halved and statistic.first is None:
            statistic.first = torch.zeros_like(statistic.total)
        if statistic.first is not None and statistic.first is statistic.total:
            statistic.first = statistic.total.clone()
        totals += [each for each in (statistic.total, statistic.first) if each is not None]
    counts = torch.tensor([[each.count, each.first_count] for each in statistics], dtype=torch.int64)
    world.sum_([counts, *totals])
    for (count, first_count), statistic in zip(counts.tolist(), statistics, strict=True):
        statistic.count, statistic.first_count = count, first_count


def _forward(model: nn.Module, batch: Batch, number: int) -> None:
    try:
        with allocating(f"batch {number}", f"a forward pass of {batch_size(batch)} samples"):
            run(model, batch)
    except (NumericsError, MemoryLimitError):
        raise
    except Exception as cause:
        raise TraceError(
            f"batch {number}",
            law="the model runs on every batch of the data",
            got=str(cause),
            cure="give all batches the shape, dtype and keys of the first; one sample in ten is held out, so the model"
            " must take batches of any size",
        ) from cause


class _Feeder:
    """Forward hook of one site: cuts its input into chunks of positions and feeds the statistics."""

    def __init__(
        self, site: Site, module: nn.Module, statistics: list[Statistic], positions: int | None, key: tuple[int, ...]
    ) -> None:
        adapter = adapter_for(module)
        if adapter is None:
            raise TypeError(f"{site.path} has no adapter")
        self.site, self.module, self.statistics = site, module, statistics
        self._adapter: Adapter = adapter
        self._needs = size_of(site, [statistic.name for statistic in statistics], repaired=False).statistics
        self._positions = positions
        self._key = key
        self._generator = generator(*key)
        self._first = torch.ones(1, dtype=torch.bool)

    def begin(self, piece: int, first: Tensor) -> None:
        """Begin a piece of the data, whose draws depend on its number, and not on the process that runs it.

        Args:
            piece: Number of the piece.
            first: Mask of its samples, shape (samples,): True for those of the first half.
        """
        self._first = first
        if self._positions is not None:
            self._generator = generator(*self._key, piece)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        inputs: Tensor = self._adapter.read(layer, input_of(args, kwargs))
        chosen = self._draw(inputs)
        reads = any(statistic.reads_outputs for statistic in self.statistics)
        seen = rows_of(self._adapter, layer, inputs)
        labels = labels_of_rows(self._first, seen, self.site.rows).to(inputs.device)
        with allocating(repr(self.site.path), "the statistics of a layer", needs=self._needs):
            for rows, patches, outputs in chunks(self._adapter, layer, inputs, [output] if reads else [], chosen):
                for first in (True, False):
                    own = labels[rows] == first
                    if bool(own.any()):
                        read = of_rows(outputs[0], own) if reads else None
                        for statistic in self.statistics:
                            statistic.update(of_rows(patches, own), read, first=first)

    def _draw(self, inputs: Tensor) -> Tensor | None:
        if self._positions is None:
            return None
        size, _ = self._adapter.sample_size(self.module, inputs)
        geometry = self._adapter.geometry(self.module)
        available = prod(geometry.output_size(size)) if size else inputs[:1].shape[1:-1].numel()
        if available <= self._positions:
            return None
        return torch.randperm(available, generator=self._generator)[: self._positions].sort().values

    def check(self, number: int) -> None:
        """Refuse sums that are not finite."""
        for statistic in self.statistics:
            if statistic.total is not None and not bool(torch.isfinite(statistic.total).all()):
                raise NumericsError(
                    repr(self.site.path),
                    law="every activation is finite",
                    got=f"NaN or infinity in the {statistic.name} of batch {number}",
                    cure="look at that batch, or at the layers before this one",
                )


def tells_apart(rows: int, samples: int, alone: Collection[int]) -> bool:
    """Whether the rows of a layer's input are those of one sample after the other.

    With time in front (`batch_first=False`) they are not, also where their number happens to be a multiple of that of
    the samples: one sample alone has as many.

    Args:
        rows: Number of rows that the layer sees.
        samples: Number of samples that they are of.
        alone: Numbers of rows that it sees of one sample alone, in any of its calls; empty where they are not known.
    """
    return rows % samples == 0 and (not alone or rows // samples in alone)


def labels_of_rows(labels: Tensor, rows: int, alone: Collection[int] = ()) -> Tensor:
    """Labels of samples, repeated for the rows of a layer's input: one row a sample, or several in a run.

    Where rows cannot be assigned to samples (`tells_apart`), all of them get the label of the first sample.

    Args:
        labels: Labels, one a sample.
        rows: Number of rows that the layer sees.
        alone: Numbers of rows that it sees of one sample alone, as for `tells_apart`.
    """
    if not tells_apart(rows, len(labels), alone):
        return labels[:1].expand(rows)
    return labels.repeat_interleave(rows // len(labels))


def of_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """The entries of a tensor (groups, rows·positions, …) that belong to some rows.

    Args:
        values: Patches or outputs, in the order of the rows.
        chosen: Mask of the rows, shape (rows,).
    """
    if bool(chosen.all()):
        return values
    return torch.unflatten(values, 1, (len(chosen), -1))[:, chosen].flatten(1, 2)


def chunks(
    adapter: Adapter, layer: nn.Module, inputs: Tensor, outputs: Sequence[Tensor], positions: Tensor | None
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Patches of a few samples, or of some positions of one, so that no chunk is over `CHUNK_BYTES`.

    Args:
        adapter: Adapter of the layer.
        layer: The layer.
        inputs: Inputs of the layer.
        outputs: Tensors of the shape of its output, of any meaning.
        positions: Indices of the positions of each sample; None is all.

    Yields:
        The samples as a slice, their patches, and each of the outputs in the order of the patches.
    """
    geometry = adapter.geometry(layer)
    size, _ = adapter.sample_size(layer, inputs)
    if inputs.ndim == 1 or (size and inputs.ndim == len(size) + 1):  # one sample without a batch axis
        inputs, outputs = inputs[None], [output[None] for output in outputs]
    a_sample = prod(geometry.output_size(size)) if size else inputs.shape[1:-1].numel()
    rows = a_sample if positions is None else len(positions)
    a_row = geometry.features * geometry.groups * max(inputs.element_size(), 4)  # half precision is widened to float32
    room = max(1, CHUNK_BYTES // a_row)
    step, pieces = max(1, room // max(1, rows)), [positions]
    if rows > room:
        pieces = list(torch.split(torch.arange(rows) if positions is None else positions, room))
    for start in range(0, inputs.shape[0], step):
        part = slice(start, start + step)
        for piece in pieces:
            patches = adapter.patches(layer, inputs[part], piece)
            yield part, patches, [adapter.outputs(layer, output[part], piece) for output in outputs]


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None

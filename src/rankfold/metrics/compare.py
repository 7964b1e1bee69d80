"""Original against compressed, on data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.errors import DataError, NumericsError, RankfoldError, TraceError, allocating
from rankfold.graph.sites import check_module
from rankfold.graph.trace import Batch, batch_size, device_of, evaluating, run, split_batch, take, to_device
from rankfold.statistics.data import as_batches, numbered
from rankfold.statistics.distributed import ALONE, World


@dataclass(frozen=True)
class Comparison:
    """How alike two models are on some data.

    An example is one row of logits: an image, or one position of a sequence.

    Attributes:
        samples: Samples looked at.
        examples: Rows of logits looked at.
        agreement: Fraction of examples with the same arg-max.
        kl: Mean `KL(softmax(original) ‖ softmax(compressed))` an example, in nats.
        relative_error: `‖compressed − original‖² / ‖original‖²`; the mean of it over the output tensors.
        max_difference: Largest absolute difference of an output.
        top1: Fraction of labelled examples whose arg-max is the label, (original, compressed); None without labels.
        top5: The same for the five largest.
        perplexity: `exp` of the mean cross-entropy against the labels, (original, compressed), for sequence outputs;
            labels that are the input tokens themselves are predicted from the position before. At most e^700.
        changed: Indices of the examples whose arg-max differs, in the order of the data.
        logits: Whether the output looks like logits (named so, or one row a sample), so that KL means something.
        output_errors: The relative error of each output tensor, where the model gives several; agreement, KL and the
            labels are about the first.
    """

    samples: int
    examples: int
    agreement: float
    kl: float
    relative_error: float
    max_difference: float
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None
    perplexity: tuple[float, float] | None
    changed: tuple[int, ...]
    logits: bool
    output_errors: tuple[float, ...] = ()

    @property
    def divergence(self) -> float:
        """What candidates are ranked by: the relative error of the outputs.

        Not the KL: a network is so sure of the images it was trained on that their KL says little about others.
        """
        return self.relative_error

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def output_tensors(output: Any) -> tuple[list[Tensor], bool]:
    """The tensors of an output that are compared, and whether the first is logits.

    The entry named "logits" of a mapping, else every floating tensor that the output holds itself (what is nested in
    it, such as a cache, is left out). One of two axes and several columns counts as logits.

    Raises:
        DataError: The output holds no floating tensor.
    """
    if names_logits(output):
        return [output["logits"]], True
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    found = [
        value
        for value in ((output,) if isinstance(output, Tensor) else values)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not found:
        raise DataError(
            "output",
            law="the model returns a floating tensor, or a tuple or mapping that holds one",
            got=type(output).__name__,
            cure="wrap the model so that it returns its logits",
        )
    return found, looks_like_logits(found[0])


def names_logits(output: Any) -> bool:
    """Whether an output is a mapping with an entry "logits"."""
    return isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor)


def looks_like_logits(output: Tensor) -> bool:
    """Whether an output has one row a sample, and several columns."""
    return output.ndim == 2 and output.shape[1] > 1


def output_tensor(output: Any) -> tuple[Tensor, bool]:
    """The first of `output_tensors`, and whether it is logits."""
    found, logits = output_tensors(output)
    return found[0], logits


def labels_of(batch: Any) -> Tensor | None:
    """Integer labels of a batch: the second item of a tuple, or the entry "labels" of a dict."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        label = batch[1]
    elif isinstance(batch, Mapping):
        label = batch.get("labels")
    else:
        return None
    integer = isinstance(label, Tensor) and not label.is_floating_point() and label.dtype != torch.bool
    return label if integer else None


def _are_inputs(batch: Any, labels: Tensor) -> bool:
    """Whether the labels of a sequence are its own tokens (-100 aside), as transformers has them for causal models.

    Labels that are something else (a shifted copy, the target of an encoder-decoder, masked tokens) stand at the
    positions that predict them.
    """
    args, kwargs = split_batch(batch)
    inputs = [*args, *(value for name, value in kwargs.items() if name != "labels")]
    usable = labels >= 0
    return any(
        isinstance(value, Tensor)
        and value.shape == labels.shape
        and bool((value.to(labels.device) == labels)[usable].all())
        for value in inputs
    )


def _check_labels(labels: Tensor, classes: int, number: int) -> None:
    """Refuse labels that are no class of the output."""
    if labels.numel() and int(labels.max()) >= classes:
        raise DataError(
            "data",
            law=f"every label is below the {classes} entries of the output, or negative (padding)",
            got=f"{int(labels.max())} in batch {number}",
            cure="give the labels that the model was trained on, or leave them out",
        )


def _check_number(labels: Tensor, samples: int, number: int) -> None:
    """Refuse labels that are more or fewer than the samples they come with."""
    given = labels.shape[0] if labels.ndim else 1
    if given != samples:
        raise DataError(
            f"batch {number}",
            law="as many labels as samples",
            got=f"{given} labels of shape {tuple(labels.shape)} for {samples} samples",
            cure="give each sample its label, or leave them out",
        )


def check_shapes(first: Tensor, second: Tensor) -> None:
    """Refuse outputs of two models that have not one shape."""
    if first.shape != second.shape:
        raise DataError(
            "output",
            law="both models give outputs of one shape",
            got=f"{tuple(first.shape)} and {tuple(second.shape)}",
            cure="compare a model with its own compression",
        )


def check_finite(whose: str, output: Tensor, number: int) -> None:
    """Refuse an output with NaN or infinity.

    Raises:
        NumericsError: Naming the model and the batch.
    """
    if not bool(torch.isfinite(output).all()):
        here = whose == "original"
        raise NumericsError(
            f"output of the {whose} model",
            law="every output is finite",
            got=f"NaN or infinity in batch {number}",
            cure="look at that batch, or at the model's weights" if here else "look at the site errors in the report",
        )


def compare(original: nn.Module, compressed: nn.Module, data: Any, *, world: World = ALONE) -> Comparison:
    """Run both models over data and compare their outputs.

    Both run in eval mode and are left as they were. Memory is one batch of outputs. Comparison is in float64.

    Args:
        original: The original model.
        compressed: Another with outputs of the same shape.
        data: A re-iterable of batches, as for `compress`; labels, where there are any, give top-1 and top-5.
        world: The processes that share the data, sample by sample; all get the whole comparison.

    Returns:
        The comparison.

    Raises:
        ModelError: One of the two is no module, or has tensors on meta.
        DataError: No data, outputs of different shapes, labels that are no class of the output, or not one a sample.
        TraceError: A model does not run on a batch; the batch is named.
        NumericsError: An output of either model is not finite; the batch is named.
    """
    check_module(original, "original")
    check_module(compressed, "compressed")
    tally = _Tally()
    with evaluating(original), evaluating(compressed):
        for number, batch in _shares(as_batches(data), tally, world):
            first, logits = output_tensors(run_on("original", original, batch, number))
            second, _ = output_tensors(run_on("compressed", compressed, batch, number))
            tally.add(number, batch, first, [mine.to(first[0].device) for mine in second], logits)
    tally.sum_over(world)
    return tally.result()


def run_on(whose: str, model: nn.Module, batch: Batch, number: int) -> Any:
    """A model's output on a batch of the data.

    Raises:
        TraceError: The model does not run on it; the batch is named.
    """
    try:
        with allocating(f"batch {number}", f"a forward pass of the {whose} model on {batch_size(batch)} samples"):
            return run(model, to_device(batch, device_of(model)))
    except RankfoldError:
        raise
    except Exception as cause:
        raise TraceError(
            f"batch {number}",
            law="both models run on every batch of the data",
            got=f"{str(cause)[:300]} from the {whose} model",
            cure="give models of one dtype, and batches of the shape, dtype and keys that they take",
        ) from cause


def _shares(batches: Iterable[Batch], tally: _Tally, world: World) -> Iterator[tuple[int, Batch]]:
    """This process's samples of every batch, an even, consecutive part of each, and the batch's number."""
    for number, batch in numbered(batches):
        if world.size == 1:
            yield number, batch
            continue
        parts = torch.arange(batch_size(batch)).tensor_split(world.size)
        for rank, part in enumerate(parts):
            tally.open_part()
            if rank == world.rank and len(part):
                yield number, _with_labels(batch, part)


def _with_labels(batch: Batch, rows: Tensor) -> Batch:
    """Samples of a batch with their labels."""
    label = labels_of(batch)
    if label is None or isinstance(batch, Mapping) or label.shape[:1] != (batch_size(batch),):
        return take(batch, rows)
    return take(batch, rows), label[rows.to(label.device)]


class _Tally:
    """Running sums of a comparison."""

    def __init__(self) -> None:
        self.samples = self.examples = self.agree = self.labelled = 0
        self.kl = self.largest = 0.0
        self.squares = torch.zeros(0, 2, dtype=torch.float64)  # of the error and of the original, for every output
        self.hits = [[0, 0], [0, 0]]  # top-1, top-5 of original, compressed
        self.cross_entropy = [0.0, 0.0]
        self.changed: list[int] = []
        self.parts: list[int] = []  # examples of each part, where several processes share the data
        self.logits, self.sequence, self.wide = True, False, True

    def add(self, number: int, batch: Batch, firsts: list[Tensor], seconds: list[Tensor], logits: bool) -> None:
        """Add one batch of outputs."""
        if len(firsts) != len(seconds) or len(self.squares) not in (0, len(firsts)):
            raise DataError(
                "output",
                law="both models give the same number of tensors on every batch",
                got=f"{len(firsts)} and {len(seconds)} in batch {number}",
                cure="compare a model with its own compression",
            )
        if not len(self.squares):
            self.squares = torch.zeros(len(firsts), 2, dtype=torch.float64)
        for i, (mine, theirs) in enumerate(zip(seconds, firsts, strict=True)):
            self._add_squares(number, i, theirs, mine)
        first, second = firsts[0], seconds[0]
        a, b = (x.double().reshape(-1, x.shape[-1] if x.ndim > 1 else 1) for x in (first, second))
        self.logits &= logits
        self.samples += batch_size(batch)
        same = a.argmax(1) == b.argmax(1)
        self.changed += (torch.nonzero(~same).flatten() + self.examples).tolist()
        self.examples += len(a)
        if self.parts:
            self.parts[-1] += len(a)
        self.agree += int(same.sum())
        log_a, log_b = F.log_softmax(a, 1), F.log_softmax(b, 1)
        self.kl += float((log_a.exp() * (log_a - log_b)).sum())
        labels = labels_of(batch)
        if labels is None:
            return
        if labels.shape != first.shape[:-1]:
            _check_number(labels, batch_size(batch), number)
            return
        _check_labels(labels, first.shape[-1], number)
        rows = torch.arange(len(a)).reshape(labels.shape)
        if first.ndim > 2:
            self.sequence = True
            if _are_inputs(batch, labels):  # a causal language model: position t predicts token t + 1
                rows, labels = rows[:, :-1], labels[:, 1:]
        self._add_labels(labels.flatten().to(a.device), rows.flatten().to(a.device), (log_a, log_b))

    def _add_squares(self, number: int, output: int, first: Tensor, second: Tensor) -> None:
        """Add one tensor of the outputs of a batch."""
        check_shapes(first, second)
        check_finite("original", first, number)
        check_finite("compressed", second, number)
        wide = first.double()
        error = wide - second.double()
        self.squares[output] += torch.stack([error.square().sum(), wide.square().sum()]).cpu()
        self.largest = max(self.largest, float(error.abs().amax()) if error.numel() else 0.0)

    def _add_labels(self, labels: Tensor, rows: Tensor, logs: tuple[Tensor, Tensor]) -> None:
        usable = labels >= 0  # -100 marks padding
        labels, rows = labels[usable], rows[usable]
        self.labelled += len(labels)
        for which, log in enumerate(logs):
            chosen = log[rows]
            top = chosen.topk(min(5, chosen.shape[1]), dim=1).indices == labels[:, None]
            self.wide &= chosen.shape[1] > 5
            self.hits[0][which] += int(top[:, 0].sum())
            self.hits[1][which] += int(top.any(1).sum())
            self.cross_entropy[which] -= float(chosen.gather(1, labels[:, None]).sum())

    def open_part(self) -> None:
        """Tell that what comes next is another part of the data, which some process adds."""
        self.parts.append(0)

    def sum_over(self, world: World) -> None:
        """Take in what all other processes added."""
        if world.size == 1:
            return
        examples = torch.tensor(self.parts, dtype=torch.int64)
        world.sum_([examples])
        whole = torch.zeros(int(examples.sum()), dtype=torch.int64)
        starts, seen = examples.cumsum(0) - examples, 0
        for start, length in zip(starts.tolist(), self.parts, strict=True):
            here = [index - seen + start for index in self.changed if seen <= index < seen + length]
            whole[here] = 1
            seen += length
        counts = torch.tensor([self.samples, self.examples, self.agree, self.labelled, *self.hits[0], *self.hits[1]])
        sums = torch.tensor([self.kl, *self.cross_entropy], dtype=torch.float64)
        outputs = torch.tensor([float(len(self.squares))], dtype=torch.float64)
        world.largest_([outputs])
        if not len(self.squares):  # no sample came here
            self.squares = torch.zeros(int(outputs), 2, dtype=torch.float64)
        extremes = torch.tensor(
            [self.largest, float(self.sequence), float(not self.logits), float(not self.wide)], dtype=torch.float64
        )
        world.sum_([whole, counts, sums, self.squares])
        world.largest_([extremes])
        self.changed = torch.nonzero(whole).flatten().tolist()
        self.samples, self.examples, self.agree, self.labelled, *hits = counts.tolist()
        self.hits = [hits[:2], hits[2:]]
        self.kl, *self.cross_entropy = sums.tolist()
        self.largest = float(extremes[0])
        self.sequence, self.logits, self.wide = bool(extremes[1]), not bool(extremes[2]), not bool(extremes[3])

    def result(self) -> Comparison:
        """The comparison over all that was added."""
        if not self.examples:
            raise DataError("data", law="at least one batch", got="none", cure="check the folder or loader behind it")
        n = self.labelled

        def share(hits: list[int]) -> tuple[float, float] | None:
            return (hits[0] / n, hits[1] / n) if n else None

        errors = tuple(e / energy if energy > 0 else float(e > 0) for e, energy in self.squares.tolist())
        # Beyond e^700 a float ends, and no JSON holds what comes after.
        first, second = (math.exp(min(total / n, 700.0)) if n else 0.0 for total in self.cross_entropy)
        return Comparison(
            self.samples,
            self.examples,
            self.agree / self.examples,
            max(self.kl / self.examples, 0.0),
            sum(errors) / len(errors),
            self.largest,
            share(self.hits[0]),
            share(self.hits[1]) if self.wide else None,
            (first, second) if n and self.sequence else None,
            tuple(self.changed),
            self.logits,
            errors if len(errors) > 1 else (),
        )

"""Result of a comparison of two models, and the running sums behind it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.data.batches import Batch, batch_size, labels_of, split_batch
from rankfold.data.splits import no_batch
from rankfold.distributed import World
from rankfold.errors import DataError, NumericsError
from rankfold.outputs.taken import Embedding, Logits, Taken


@dataclass(frozen=True)
class OutputComparison:
    """How alike one output of two models is.

    Attributes:
        name: Path to the tensor in the output: "output" where it is the only one, "logits", "feats[0]".
        kind: Kind that the output is taken for: "logits", "values" or "embedding".
        guessed: True if the kind was guessed.
        divergence: Distance by the kind: of logits the relative error in the softened Fisher metric of the softmax (see
            `Logits`), where a shift of all counts nothing; of values the relative error; of embeddings the mean of
            1 − cos.
        relative_error: Relative squared error `‖compressed − original‖² / ‖original‖²`.
        agreement: Fraction of rows with the same arg-max over the classes; None where the output is no logits.
        kl: Mean `KL(softmax(original) ‖ softmax(compressed))` a row, in nats; None where the output is no logits.
        cosine: Mean cosine; None where the output is no embedding.
    """

    name: str
    kind: str
    guessed: bool
    divergence: float
    relative_error: float
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How alike two models are on some data.

    An example is one row of the first logits: an image, one position of a sequence, or a pixel of a map; without logits
    one row of the first output.

    Attributes:
        samples: Number of samples compared.
        examples: Number of examples compared.
        agreement: Fraction of examples with the same arg-max over the classes; None where no output is logits.
        kl: Mean `KL(softmax(original) ‖ softmax(compressed))` an example, in nats; None where no output is logits.
        relative_error: Mean of `‖compressed − original‖² / ‖original‖²` over the output tensors.
        max_difference: Largest absolute difference of an output.
        top1: Fraction of labelled examples whose arg-max is the label, (original, compressed); None without labels.
        top5: Fraction of labelled examples whose label is among the five largest, (original, compressed); None
            without labels, or with five classes or fewer.
        perplexity: Exponential of the mean cross-entropy against the labels, (original, compressed), for sequence
            outputs; labels that are the input tokens themselves are predicted from the position before. At most e^700.
        changed: Indices of the examples whose arg-max differs, in the order of the data.
        logits: True if an output is logits; agreement, KL and the labels are about the first that is.
        outputs: Comparisons of all output tensors that count.
        passed: Names of the original's outputs that were not compared, with the reason.
    """

    samples: int
    examples: int
    agreement: float | None
    kl: float | None
    relative_error: float
    max_difference: float
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None
    perplexity: tuple[float, float] | None
    changed: tuple[int, ...]
    logits: bool
    outputs: tuple[OutputComparison, ...] = ()
    passed: tuple[str, ...] = ()

    @property
    def divergence(self) -> float:
        """Mean of the divergences of the outputs, by which candidates are ranked.

        The KL is not used: a network is so sure of the images it was trained on that their KL predicts little about
        others.
        """
        if not self.outputs:
            return self.relative_error
        return sum(each.divergence for each in self.outputs) / len(self.outputs)

    @property
    def taken_for(self) -> str:
        """Kinds that the outputs were taken for, in words, such as `logits (guessed)`."""
        parts = {each.name: each.kind + " (guessed)" * each.guessed for each in self.outputs}
        return next(iter(parts.values())) if len(parts) == 1 else ", ".join(f"{n}: {part}" for n, part in parts.items())

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


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


def check_number(labels: Tensor, samples: int, number: int) -> None:
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
        NumericsError: The output is not finite; the model and the batch are named.
    """
    if not bool(torch.isfinite(output).all()):
        here = whose == "original"
        raise NumericsError(
            f"output of the {whose} model",
            law="every output is finite",
            got=f"NaN or infinity in batch {number}",
            cure="look at that batch, or at the model's weights" if here else "look at the site errors in the report",
        )


class Tally:
    """Running sums of a comparison.

    Args:
        taken: Outputs that count, and their kinds.
        parts: Numbers of examples of each part of the data, where several processes share it; the caller appends parts.
    """

    def __init__(self, taken: Taken, parts: list[int]) -> None:
        count = len(taken.kinds)
        self.taken, self.parts = taken, parts
        kinds = list(taken.kinds.values())
        self.decided = next((i for i, kind in enumerate(kinds) if isinstance(kind, Logits)), None)
        self.samples = self.examples = self.labelled = 0
        self.largest = 0.0
        self.squares = torch.zeros(count, 2, dtype=torch.float64)  # sums of squares of the error and of the original
        self.own = torch.zeros(count, 2, dtype=torch.float64)  # the same, in the metric of the output's kind
        self.alike = torch.zeros(count, 3, dtype=torch.float64)  # rows, rows of equal arg-max, KL
        self.hits = [[0, 0], [0, 0]]  # top-1 and top-5, each of the original and the compressed model
        self.cross_entropy = [0.0, 0.0]
        self.changed: list[int] = []
        self.sequence, self.wide = False, True

    def add(
        self, number: int, batch: Batch, firsts: list[Tensor], seconds: list[Tensor], whole: Batch | None = None
    ) -> None:
        """Add one batch of outputs."""
        for i, (kind, first, second) in enumerate(zip(self.taken.kinds.values(), firsts, seconds, strict=True)):
            check_shapes(first, second)
            decided = i == self.decided and isinstance(kind, Logits)
            labels = self._labels(number, batch, kind, first, whole) if decided and isinstance(kind, Logits) else None
            start = 0
            for own, mine, theirs in kind.pieces(first, second):
                check_finite("original", mine, number)
                check_finite("compressed", theirs, number)
                wide, other = mine.double(), theirs.double()
                error = wide - other
                self.squares[i] += torch.stack([error.square().sum(), wide.square().sum()]).cpu()
                self.own[i] += own.error(wide, other).cpu()
                self.largest = max(self.largest, float(error.abs().amax()) if error.numel() else 0.0)
                if isinstance(own, Logits):
                    logs = F.log_softmax(own.rows(wide), 1), F.log_softmax(own.rows(other), 1)
                    same = own.rows(wide).argmax(1) == own.rows(other).argmax(1)
                    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum())
                    self.alike[i] += torch.tensor([len(same), int(same.sum()), kl], dtype=torch.float64)
                    if decided:
                        self._add_decisions(same, labels, start, logs)
                    start += len(same)
        self.samples += batch_size(batch)
        if self.decided is None:
            if (given := labels_of(batch)) is not None:
                check_number(given, batch_size(batch), number)
            self._add_examples(firsts[0].numel() // (firsts[0].shape[-1] if firsts[0].ndim > 1 else 1))

    def _add_examples(self, count: int) -> None:
        self.examples += count
        if self.parts:
            self.parts[-1] += count

    def _labels(
        self, number: int, batch: Batch, kind: Logits, output: Tensor, whole: Batch | None
    ) -> tuple[Tensor, Tensor] | None:
        """Labels of a batch, and the rows of its logits that they belong to; None where it has none.

        Args:
            number: Number of the batch.
            batch: The batch.
            kind: Kind of the output.
            output: The logits.
            whole: Batch that this one is a part of, which tells whether labels are the tokens; None is itself.
        """
        labels, shape = labels_of(batch), kind.example_shape(output)
        if labels is None:
            return None
        if labels.shape != shape:
            check_number(labels, batch_size(batch), number)
            return None
        _check_labels(labels, output.numel() // max(shape.numel(), 1), number)
        rows = torch.arange(shape.numel()).reshape(labels.shape)
        if labels.ndim > 1:
            self.sequence |= labels.ndim == 2
            told = batch if whole is None else whole
            every = labels_of(told)
            if every is not None and _are_inputs(told, every):  # causal: position t predicts token t + 1
                rows, labels = rows[:, :-1], labels[:, 1:]
        return labels.flatten().to(output.device), rows.flatten().to(output.device)

    def _add_decisions(
        self, same: Tensor, labels: tuple[Tensor, Tensor] | None, start: int, logs: tuple[Tensor, Tensor]
    ) -> None:
        """Add some rows of the first logits of a batch.

        Args:
            same: Mask over the rows: True where the arg-max is the same.
            labels: Labels of the batch, with the rows that they belong to; see `_labels`.
            start: Number of the first row in the batch.
            logs: Logarithms of the probabilities, rows × classes, of both models.
        """
        self.changed += (torch.nonzero(~same).flatten() + self.examples).tolist()
        self._add_examples(len(same))
        if labels is not None:
            given, rows = labels
            here = (rows >= start) & (rows < start + len(same))
            self._add_labels(given[here], rows[here] - start, logs)

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

    def sum_over(self, world: World) -> None:
        """Add the sums of all other processes."""
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
        counts = torch.tensor([self.samples, self.examples, self.labelled, *self.hits[0], *self.hits[1]])
        sums = torch.tensor(self.cross_entropy, dtype=torch.float64)
        extremes = torch.tensor([self.largest, float(self.sequence), float(not self.wide)], dtype=torch.float64)
        world.sum_([whole, counts, sums, self.squares, self.own, self.alike])
        world.largest_([extremes])
        self.changed = torch.nonzero(whole).flatten().tolist()
        self.samples, self.examples, self.labelled, *hits = counts.tolist()
        self.hits = [hits[:2], hits[2:]]
        self.cross_entropy = sums.tolist()
        self.largest = float(extremes[0])
        self.sequence, self.wide = bool(extremes[1]), not bool(extremes[2])

    def result(self) -> Comparison:
        """The comparison over all that was added."""
        if not self.examples:
            raise no_batch()
        n = self.labelled

        def share(hits: list[int]) -> tuple[float, float] | None:
            return (hits[0] / n, hits[1] / n) if n else None

        each = self._outputs()
        # Beyond e^700 a float ends, and no JSON holds what comes after.
        first, second = (math.exp(min(total / n, 700.0)) if n else 0.0 for total in self.cross_entropy)
        return Comparison(
            self.samples,
            self.examples,
            None if self.decided is None else each[self.decided].agreement,
            None if self.decided is None else each[self.decided].kl,
            sum(one.relative_error for one in each) / len(each),
            self.largest,
            share(self.hits[0]),
            share(self.hits[1]) if self.wide else None,
            (first, second) if n and self.sequence else None,
            tuple(self.changed),
            self.decided is not None,
            each,
            self.taken.passed,
        )

    def _outputs(self) -> tuple[OutputComparison, ...]:
        rows = []
        sums = zip(self.taken.kinds.items(), self.squares.tolist(), self.own.tolist(), self.alike.tolist(), strict=True)
        for (name, kind), squares, own, (count, same, kl) in sums:
            divergence, logits = lost_share(*own), isinstance(kind, Logits)
            rows.append(
                OutputComparison(
                    name,
                    str(kind),
                    name in self.taken.guessed,
                    divergence,
                    lost_share(*squares),
                    same / count if logits else None,
                    max(kl / count, 0.0) if logits else None,
                    1 - divergence if isinstance(kind, Embedding) else None,
                )
            )
        return tuple(rows)


def lost_share(lost: float, whole: float) -> float:
    """Share of the whole that was lost; 1 where the whole is zero and the loss is not."""
    return lost / whole if whole > 0 else float(lost > 0)

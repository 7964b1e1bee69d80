"""Quantities of a compressed model that a search can lower, measured on held-out samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.checks import check_choice, check_number, is_number
from rankfold.comparison.compare import run_on
from rankfold.data.batches import Batch, labels_of
from rankfold.data.running import evaluating
from rankfold.data.splits import numbered
from rankfold.errors import DataError, NumericsError, OptionError
from rankfold.outputs.taken import output_tensor
from rankfold.registry import UNWRITTEN, register

IGNORED = -100  # label of a row that does not count
DIRECTIONS = ("original to compressed", "compressed to original")


class Objective(ABC):
    """A number of a compressed model that is better when it is less. A subclass is a frozen, registered dataclass."""

    @abstractmethod
    def measure(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """The number, over all samples of some batches; both models are in eval mode."""

    def of(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """`measure`, with both models in eval mode, and checked.

        Raises:
            NumericsError: It is NaN.
        """
        with evaluating(original), evaluating(compressed):
            value = float(self.measure(original, compressed, batches))
        if math.isnan(value):
            raise NumericsError(
                type(self).__name__, law="a number", got="NaN", cure="look at the outputs of the compressed model"
            )
        return value


def _pairs(
    original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches, and the first compared output of both models on them, in float64."""
    for number, batch in numbered(batches):
        first, second = (
            output_tensor(run_on(whose, model, batch, number))[0].double()
            for whose, model in (("original", original), ("compressed", compressed))
        )
        yield batch, first, second


@register("kl")
@dataclass(frozen=True)
class KL(Objective):
    """Mean Kullback–Leibler divergence between the models' softmaxes over the last axis, in nats.

    Attributes:
        direction: "original to compressed" is `KL(p ‖ q) = Σ p log(p/q)`, `p` the original's; "compressed to original"
            is `KL(q ‖ p)`.
    """

    direction: str = DIRECTIONS[0]

    def __post_init__(self) -> None:
        check_choice("KL.direction", self.direction, DIRECTIONS)

    def measure(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """See `Objective.measure`."""
        total, rows = 0.0, 0
        for _, mine, theirs in _pairs(original, compressed, batches):
            total, rows = total + float(_kl(mine, theirs, self.direction).sum()), rows + mine[..., 0].numel()
        return total / _counted(rows)


@register("cross-entropy")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean cross-entropy of the labels that come with the data, in nats: `−log q(label)`."""

    def measure(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """See `Objective.measure`.

        Raises:
            DataError: A batch has no labels.
        """
        total, rows = 0.0, 0
        for number, batch in numbered(batches):
            labels = labels_of(batch)
            if labels is None:
                raise DataError(
                    f"batch {number}",
                    law="every batch has labels, one a sample, for CrossEntropy()",
                    got="none",
                    cure='pass (inputs, labels) or a dict with "labels", or choose KL()',
                )
            logits = output_tensor(run_on("compressed", compressed, batch, number))[0].double()
            logits = logits.reshape(-1, logits.shape[-1])
            wanted = labels.reshape(-1).long().to(logits.device)
            used = wanted != IGNORED
            if len(wanted) != len(logits) or bool(((wanted[used] < 0) | (wanted[used] >= logits.shape[1])).any()):
                raise DataError(
                    f"batch {number}",
                    law=f"a label below {logits.shape[1]}, or {IGNORED}, for each of {len(logits)} rows of scores",
                    got=f"labels {tuple(labels.shape)}, from {int(labels.min())} to {int(labels.max())}",
                    cure="correct the labels, or choose KL()",
                )
            total += float(nn.functional.cross_entropy(logits[used], wanted[used], reduction="sum"))
            rows += int(used.sum())
        return total / _counted(rows)


@register("perplexity")
@dataclass(frozen=True)
class Perplexity(Objective):
    """`exp(mean −log q(next token)) + kl · KL`, of a causal language model whose batches hold "input_ids".

    Positions whose "attention_mask" is 0 do not count.

    Attributes:
        kl: Weight of the mean divergence from the original, in nats a position; 0 leaves it out.
        direction: Direction of the divergence, as of `KL`.

    References:
        Bolaco, arXiv 2405.10616, with `kl = 1e-3`; the paper writes "original to compressed", its code computes the
        other.
    """

    kl: float = 1e-3
    direction: str = DIRECTIONS[0]

    def __post_init__(self) -> None:
        check_number("Perplexity.kl", self.kl, law="a weight of at least 0", cure="try 1e-3")
        check_choice("Perplexity.direction", self.direction, DIRECTIONS)

    def measure(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """See `Objective.measure`.

        Raises:
            DataError: A batch has no "input_ids", or outputs are no logits of its positions.
        """
        surprise, apart, seen, rows = 0.0, 0.0, 0, 0.0
        for number, (batch, mine, theirs) in enumerate(_pairs(original, compressed, batches), 1):
            own: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
            tokens = own.get("input_ids")
            if tokens is None or theirs.ndim != 3 or theirs.shape[:2] != tokens.shape:
                raise DataError(
                    f"batch {number}",
                    law='Perplexity() needs "input_ids" and logits of shape (samples, positions, tokens)',
                    got="no input_ids" if tokens is None else f"outputs {tuple(theirs.shape)}",
                    cure="pass batches of a causal language model, or choose KL()",
                )
            mask = own.get("attention_mask")
            counts = (torch.ones_like(tokens) if mask is None else mask).to(theirs.device).double()
            logs = theirs.log_softmax(-1)[:, :-1]
            picked = logs.gather(-1, tokens[:, 1:, None].to(theirs.device))[..., 0]
            surprise, seen = surprise - float((picked * counts[:, 1:]).sum()), seen + int(counts[:, 1:].sum())
            if self.kl:
                apart += float((_kl(mine, theirs, self.direction) * counts).sum())
                rows += float(counts.sum())
        return math.exp(min(surprise / _counted(seen), 700.0)) + self.kl * apart / max(rows, 1.0)


@register("measured")
@dataclass(frozen=True)
class Measured(Objective):
    """A function of your own, `f(model) → float`, less being better.

    Attributes:
        label: Name, by which finished trials are recognised: change it with the function.
        function: The function. It is no part of a plan's JSON, so a plan that is read back has none.
    """

    label: str
    function: Callable[[nn.Module], float] | None = field(
        default=None, compare=False, repr=False, metadata={UNWRITTEN: True}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or not self.label:
            raise OptionError("Measured.label", law="a name", got=repr(self.label), cure='try Measured("my-metric", f)')
        if self.function is not None and not callable(self.function):
            raise OptionError("Measured.function", law="a function", got=repr(self.function), cure="pass f(model)")

    def measure(self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch]) -> float:
        """See `Objective.measure`.

        Raises:
            OptionError: The function is not there, since the objective was read from a plan.
        """
        if self.function is None:
            cure = "pass Measured(label, function)"
            raise OptionError("Measured.function", law="a function", got="none", cure=cure)
        value = self.function(compressed)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value.detach())
        if not is_number(value):
            raise OptionError(
                f"Measured({self.label!r})", law="f(model) is a number", got=repr(value)[:80], cure="return a float"
            )
        return float(value)


def _counted(rows: int) -> int:
    """A number of rows that is not 0.

    Raises:
        DataError: It is.
    """
    if rows < 1:
        raise DataError(
            "data", law="something that counts in the objective", got="nothing", cure="look at labels and masks"
        )
    return rows


def _kl(original: Tensor, compressed: Tensor, direction: str) -> Tensor:
    """The divergence of every row."""
    p, q = original.log_softmax(-1), compressed.log_softmax(-1)
    if direction != DIRECTIONS[0]:
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)

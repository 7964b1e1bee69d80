"""Decisions of the original and the compressed model compared, example by example: changes, margins, stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.checks import check_number
from rankfold.comparison.compare import check_finite, check_shapes, labels_of, run_on
from rankfold.comparison.corruptions import CORRUPTIONS, Corruption
from rankfold.data.batches import Batch, split_batch, to_device
from rankfold.data.draws import check_seed, generator
from rankfold.data.running import device_of, evaluating
from rankfold.data.splits import as_batches, numbered
from rankfold.errors import DataError, OptionError, shown
from rankfold.outputs.taken import output_tensor
from rankfold.sites.models import check_module


@dataclass(frozen=True)
class Change:
    """An example on which the two models decide otherwise.

    Attributes:
        index: Index of the example in the order of the data.
        original: Class that the original decides for.
        compressed: Class that the compressed model decides for.
        margin: Difference of the original's two largest probabilities, in [0, 1]: how sure it was.
        compressed_margin: Margin of the compressed model, likewise.
        label: Label of the example; None where there is none.
    """

    index: int
    original: int
    compressed: int
    margin: float
    compressed_margin: float
    label: int | None = None


@dataclass(frozen=True)
class ClassChange:
    """Changes of one class.

    Attributes:
        name: Index of the class in the logits.
        examples: Number of examples that the original decides for the class.
        lost: Number of these that the compressed model decides for another class.
        gained: Number of examples of other classes that the compressed model decides for this one.
        top1: Fraction of the examples with this label that get it, (original, compressed); None without labels.
    """

    name: int
    examples: int
    lost: int
    gained: int
    top1: tuple[float, float] | None = None


@dataclass(frozen=True)
class Agreement:
    """How often the two models decide alike, example by example.

    Attributes:
        examples: Number of examples compared.
        agreement: Fraction of examples decided alike.
        changes: Examples that are decided otherwise.
        classes: Changes of each class that either model decides for, ascending.
        margin: Median margin of the original over all examples.
        changed_margin: Median margin over the changed examples; None where none changed. Far below `margin`, only
            doubtful decisions have changed.
        corrupted: Agreement of the two models on corrupted inputs, by name of the corruption.
        adversarial: Agreement on inputs moved by L∞ FGSM against the original, and against the compressed model; None
            where not asked for. An attack raises the cross-entropy of the attacked model's own decision.
        fooled: Fraction of examples that the attack against the original makes (the original, the compressed model)
            decide otherwise than without it; None where not asked for.
    """

    examples: int
    agreement: float
    changes: tuple[Change, ...]
    classes: tuple[ClassChange, ...]
    margin: float
    changed_margin: float | None
    corrupted: dict[str, float]
    adversarial: tuple[float, float] | None = None
    fooled: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        return asdict(self)


def agreement(
    original: nn.Module,
    compressed: nn.Module,
    data: Any,
    *,
    corruptions: Sequence[Corruption] = CORRUPTIONS,
    fgsm: float | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare two classifiers example by example, also on corrupted inputs and under attack.

    Args:
        original: The original model.
        compressed: The compressed model; outputs of both are samples × classes.
        data: A re-iterable of batches, as for `compare`; labels are used where there are any.
        corruptions: Changes of the inputs to be tried; empty for none, which inputs of whole numbers need.
        fgsm: Largest change of an input element by an attack, in the units of the inputs; None attacks nothing.
        seed: Seed of the corruptions that draw; each is the same in every run.

    Returns:
        The agreement.

    Raises:
        ModelError: One of the two is no module.
        DataError: No data, outputs that are no logits, or inputs that cannot be corrupted or attacked.
        OptionError: An option of another kind, or two corruptions of one name.
        TraceError: A model does not run on a batch; the batch is named.
        NumericsError: An output of either model is not finite; the batch is named.

    References:
        Goodfellow, Shlens, Szegedy, ICLR 2015 (FGSM). We differ in attacking the model's own decision, so that no label
        is needed.
    """
    original = check_module(original, "original")
    compressed = check_module(compressed, "compressed")
    check_seed(seed)
    _check(corruptions, fgsm)
    tally = _Tally()
    same = dict.fromkeys((corruption.name for corruption in corruptions), 0)
    attacked, fooled = [0, 0], [0, 0]
    for number, batch in numbered(as_batches(data)):
        first, second = _both(original, compressed, batch, number)
        tally.add(first, second, labels_of(batch))
        for place, corruption in enumerate(corruptions):
            draws = generator(seed, place, number)
            changed = _with_inputs(batch, lambda x, c=corruption, g=draws: c.apply(x, g))
            mine, theirs = _both(original, compressed, changed, number)
            same[corruption.name] += int((mine.argmax(1) == theirs.argmax(1)).sum())
        if fgsm is not None:
            for place, target in enumerate((original, compressed)):
                moved = _attack(target, batch, fgsm, number)
                here, there = (each.argmax(1) for each in _both(original, compressed, moved, number))
                attacked[place] += int((here == there).sum())
                if place == 0:
                    fooled[0] += int((here != first.argmax(1)).sum())
                    fooled[1] += int((there != second.argmax(1)).sum())
    return tally.result(same, None if fgsm is None else (attacked, fooled))


def _check(corruptions: Sequence[Corruption], fgsm: float | None) -> None:
    listed = isinstance(corruptions, Sequence) and not isinstance(corruptions, str)
    if not listed or not all(isinstance(each, Corruption) for each in corruptions):
        raise OptionError(
            "corruptions",
            law="a list of corruptions",
            got=shown(corruptions),
            cure="try [rankfold.Noise(0.1)], or an empty list",
        )
    names = [each.name for each in corruptions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OptionError(
            "corruptions", law="each corruption once", got=f"{twice!r} twice", cure="leave one of them out"
        )
    if fgsm is not None:
        law = "a finite number above 0, or None"
        check_number("fgsm", fgsm, law=law, cure="try 1/255 of the input range", open_low=True)


def _both(original: nn.Module, compressed: nn.Module, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """Logits of both models on a batch."""
    return _logits("original", original, batch, number), _logits("compressed", compressed, batch, number)


def _logits(whose: str, model: nn.Module, batch: Batch, number: int) -> Tensor:
    """Logits of a batch, samples × classes, on the CPU in float64."""
    with evaluating(model):
        output, logits = output_tensor(run_on(whose, model, batch, number))
    if not logits or output.ndim != 2 or output.shape[1] < 2:
        raise DataError(
            "output",
            law="decisions are compared on logits of shape samples × classes, two classes at least",
            got=f"an output of shape {tuple(output.shape)}",
            cure="use rankfold.compare for other outputs",
        )
    check_finite(whose, output, number)
    return output.detach().double().cpu()


def _with_inputs(batch: Batch, function: Any) -> Any:
    """The model's inputs of a batch, the first floating one changed.

    Raises:
        DataError: None of them is floating.
    """
    args, kwargs = split_batch(batch)
    named: dict[Any, Any] = dict(enumerate(args)) if args else dict(kwargs)
    key = next((k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if key is None:
        raise DataError(
            "data",
            law="an input that is corrupted or attacked is a floating tensor",
            got="inputs of whole numbers",
            cure="pass corruptions=[] and fgsm=None",
        )
    named[key] = function(named[key])
    return named[0] if args else named


def _attack(model: nn.Module, batch: Batch, size: float, number: int) -> Any:
    """Inputs moved by `size · sign(∇ₓ CE(f(x), argmax f(x)))`.

    Raises:
        DataError: The outputs cannot be differentiated by the inputs.
    """
    leaf: list[Tensor] = []

    def watched(inputs: Tensor) -> Tensor:
        leaf.append(inputs.detach().clone().requires_grad_())
        return leaf[0].clone()  # a copy, which the forward may write into

    with evaluating(model), torch.enable_grad():
        moved = _with_inputs(to_device(batch, device_of(model)), watched)
        args, kwargs = split_batch(moved)
        try:
            output, _ = output_tensor(model(*args, **kwargs))
            (gradient,) = torch.autograd.grad(F.cross_entropy(output, output.argmax(1)), leaf)
        except RuntimeError as cause:
            raise DataError(
                f"batch {number}",
                law="an attack differentiates the outputs by the first floating input",
                got=str(cause).splitlines()[0][:160],
                cure="pass fgsm=None, or wrap the model so that its first floating input is the one to be attacked",
            ) from cause
    return _with_inputs(batch, lambda inputs: inputs + size * gradient.sign().to(inputs))


class _Tally:
    """Decisions and margins so far."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.margins: list[tuple[Tensor, Tensor]] = []
        self.labels: list[Tensor | None] = []

    def add(self, first: Tensor, second: Tensor, labels: Tensor | None) -> None:
        """Add the logits of a batch."""
        check_shapes(first, second)
        self.first.append(first.argmax(1))
        self.second.append(second.argmax(1))
        self.margins.append((_margin(first), _margin(second)))
        fits = labels is not None and labels.shape == first.shape[:1]
        self.labels.append(labels.cpu() if labels is not None and fits else None)

    def result(self, same: dict[str, int], attacks: tuple[list[int], list[int]] | None) -> Agreement:
        """The agreement over all that was added."""
        if not self.first:
            raise DataError("data", law="at least one batch", got="none", cure="check the folder or loader behind it")
        first, second = torch.cat(self.first), torch.cat(self.second)
        margin, other = (torch.cat([pair[i] for pair in self.margins]) for i in (0, 1))
        known = [label for label in self.labels if label is not None]
        labels = torch.cat(known) if len(known) == len(self.labels) else None
        places = torch.nonzero(first != second).flatten()
        changes = tuple(
            Change(
                i,
                int(first[i]),
                int(second[i]),
                float(margin[i]),
                float(other[i]),
                None if labels is None else int(labels[i]),
            )
            for i in places.tolist()
        )
        count = len(first)
        pair = None if attacks is None else tuple((each[0] / count, each[1] / count) for each in attacks)
        return Agreement(
            count,
            1 - len(changes) / count,
            changes,
            _classes(first, second, labels),
            float(margin.median()),
            float(margin[places].median()) if len(places) else None,
            {name: hits / count for name, hits in same.items()},
            None if pair is None else pair[0],
            None if pair is None else pair[1],
        )


def _margin(logits: Tensor) -> Tensor:
    top = logits.softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def _classes(first: Tensor, second: Tensor, labels: Tensor | None) -> tuple[ClassChange, ...]:
    result = []
    for name in torch.unique(torch.cat([first, second])).tolist():
        mine, theirs = first == name, second == name
        top1 = None
        if labels is not None and bool((labels == name).any()):
            so = labels == name
            top1 = float(mine[so].double().mean()), float(theirs[so].double().mean())
        lost, gained = int((mine & ~theirs).sum()), int((~mine & theirs).sum())
        result.append(ClassChange(name, int(mine.sum()), lost, gained, top1))
    return tuple(result)

"""Outputs of a model: the tensors that count, by name, and the kind of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.data.batches import Batch, batch_size, take, to_device, with_labels
from rankfold.data.running import device_of, evaluating, run
from rankfold.data.splits import no_batch
from rankfold.errors import DataError, OptionError, near_matches, shown
from rankfold.outputs.kinds import Embedding, Logits, Output, Values, class_axis
from rankfold.registry import from_json, to_json

__all__ = [
    "LOOKED_AT",
    "Embedding",
    "Logits",
    "Opened",
    "Output",
    "Outputs",
    "Taken",
    "Values",
    "check_outputs",
    "first_samples",
    "opened",
    "output_tensor",
    "outputs_from_json",
    "outputs_to_json",
    "settle",
    "settled",
]
Outputs: TypeAlias = Output | Mapping[str, Output | None] | None

SHIFT = 0.05  # largest share of an output's variance in a common shift where it counts as logits
LOOKED_AT = 32  # number of samples by which an output's kind is guessed
FEW = 4  # the guess uses at most this many times the samples that run at once
AUXILIARY = re.compile(  # entries by which models of transformers hand out what is inside them, or their loss
    r"loss|mems|past_key_values|past_buckets_states|\w*hidden_states|\w*attentions|\w*attn_weights|\w*router_logits"
    r"|\w*router_probs|\w*cache\w*|encoder_last_hidden_state|\w+_loss"
)
NORMALISED = 1e-3  # distance from 1 of a norm, or of a sum of probabilities, by rounding in half precision
EMBEDDED = re.compile("embed")
INNER = re.compile("pooled|pooler|hidden|feat")
NAMED = re.compile(r"(\w+_)?logits(_\w+)?")


@dataclass(frozen=True, eq=False)
class Opened:
    """The tensors of one output.

    Attributes:
        tensors: Floating tensors by name, in the order of the output.
        others: Kinds of the objects that are no floating tensor and cannot be opened: name → kind of object.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def counted(self, asked: Outputs = None) -> dict[str, Tensor]:
        """The tensors that count.

        All but those of auxiliary entries (caches, hidden states, attentions, a loss) and single numbers for a whole
        batch; these only where there is no other. An output that a mapping names counts if it is given a kind, and does
        not if it is given None.
        """
        named = asked if isinstance(asked, Mapping) else {}
        free = {name: tensor for name, tensor in self.tensors.items() if name not in named}
        usual = [name for name, tensor in free.items() if tensor.ndim and not _is_auxiliary(name)]
        wanted = {name for name, kind in named.items() if kind is not None}
        if not usual and not wanted:
            usual = [name for name, tensor in free.items() if tensor.ndim] or list(free)
        return {name: tensor for name, tensor in self.tensors.items() if name in wanted or name in usual}

    def passed(self, counted: Iterable[str]) -> tuple[str, ...]:
        """Names of the outputs that do not count, with the reason."""
        left = set(counted)
        named = {name: _why_not(name, tensor) for name, tensor in self.tensors.items() if name not in left}
        return tuple(f"{name} ({why})" for name, why in {**named, **self.others}.items())


def opened(output: Any) -> Opened:
    """Open an output: tuples, lists, mappings, dataclasses and what torch's pytrees know, as deep as they nest.

    A tensor's name is its path: `output` for a bare tensor, `logits`, `feats[0]`, `[1][0]`, `boxes.scores`. Other
    objects (a cache, a distribution), and tensors that are not floating, are listed in `others`.

    Args:
        output: Output of a model.
    """
    result = Opened()
    _open(output, "", result)
    return result


def _open(value: Any, name: str, result: Opened) -> None:
    entries = _entries(value)
    if isinstance(value, Tensor) and value.is_floating_point():
        result.tensors[_free(name or "output", result)] = value
    elif entries is not None:
        for key, entry in entries:
            _open(entry, _joined(name, key), result)
    elif not isinstance(value, (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        kind = f"a {str(value.dtype).removeprefix('torch.')} tensor" if isinstance(value, Tensor) else None
        result.others[_free(name or "output", result)] = kind or f"a {type(value).__name__}"


def _entries(value: Any) -> list[tuple[str | int, Any]] | None:
    """Entries of a container, by key, attribute or place; None for an object that cannot be opened."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return [(key if isinstance(key, (str, int)) else repr(key), entry) for key, entry in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name)) for each in dataclasses.fields(value)]
    if type(value) in _pytree.SUPPORTED_NODES:
        return list(enumerate(_pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]))
    return None


def _joined(name: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{name}[{key}]"
    return f"{name}.{key}" if name else key


def _free(name: str, result: Opened) -> str:
    while name in result.tensors or name in result.others:
        name += "'"
    return name


def _words(name: str) -> list[str]:
    """The keys of a name, without places."""
    return re.sub(r"\[\d+\]", "", name).split(".")


def _is_auxiliary(name: str) -> bool:
    return any(AUXILIARY.fullmatch(word) for word in _words(name))


def _why_not(name: str, tensor: Tensor) -> str:
    if _is_auxiliary(name):
        return "an auxiliary entry"
    return "one number for the whole batch" if tensor.ndim == 0 else "left out as asked"


@dataclass(frozen=True, eq=False)
class Taken:
    """Outputs of a model that count, and their kinds.

    Attributes:
        kinds: Kinds by name of the tensor, in the order of the output; at least one.
        guessed: Names of the outputs whose kind was guessed.
        passed: Names of the outputs that do not count, with the reason.
        asked: Kinds that the caller gave; None where all are guessed.
    """

    kinds: dict[str, Output]
    guessed: frozenset[str] = frozenset()
    passed: tuple[str, ...] = ()
    asked: Outputs = None

    def of(self, output: Any, number: int | None = None) -> list[Tensor]:
        """The tensors of an output that count, in the order of `kinds`.

        Args:
            output: Output of the model.
            number: Number of the batch, for the message; None leaves it out.

        Raises:
            DataError: The output does not hold exactly these tensors, or one cannot be of its kind.
        """
        found = opened(output).counted(self.asked)
        if found.keys() != self.kinds.keys():
            raise DataError(
                "output",
                law="both models give the same tensors on every batch",
                got=f"{', '.join(self.kinds)} and {', '.join(found) or 'none'}"
                + ("" if number is None else f" in batch {number}"),
                cure="compare a model with its own compression",
            )
        for name, kind in self.kinds.items():
            kind.check(name, found[name])
        return [found[name] for name in self.kinds]


def check_outputs(outputs: Any) -> None:
    """Refuse a value that gives no kinds of outputs.

    Raises:
        OptionError: It is no kind of output, no mapping from names to kinds, and not None.
    """
    named = isinstance(outputs, Mapping) and all(
        isinstance(name, str) and (kind is None or isinstance(kind, Output)) for name, kind in outputs.items()
    )
    if outputs is not None and not named and not isinstance(outputs, (Output, Taken)):
        raise OptionError(
            "outputs",
            law="an instance of Logits, Values or Embedding, a dict of them by name of the output, or None",
            got=shown(outputs),
            cure="try rankfold.Logits()",
        )


def outputs_to_json(outputs: Outputs) -> Any:
    """The given kinds as JSON values: one kind, or kinds by name under "by_name"."""
    if isinstance(outputs, Mapping):
        return {"by_name": {name: None if kind is None else to_json(kind) for name, kind in outputs.items()}}
    return None if outputs is None else to_json(outputs)


def outputs_from_json(value: Any, place: str) -> Outputs:
    """Read the result of `outputs_to_json`.

    Raises:
        PlanError: The value is something else.
    """
    if isinstance(value, Mapping) and isinstance(value.get("by_name"), Mapping):
        return {
            name: None if kind is None else from_json(kind, Output, place=f"{place}.{name}")
            for name, kind in value["by_name"].items()
        }
    result: Outputs = None if value is None else from_json(value, Output, place=place)
    return result


def settled(
    model: nn.Module, batches: Iterable[Batch], outputs: Outputs | Taken = None, at_once: int = LOOKED_AT
) -> Taken:
    """Kinds of the outputs of a model, as given, or guessed by the first 32 samples; see `settle`.

    Args:
        model: The model.
        batches: Calibration inputs.
        outputs: Kinds that the caller gave; a `Taken` is returned as it is.
        at_once: Number of samples that run at once; for large outputs fewer than 32 in all are used.

    Raises:
        DataError: Same as `settle`, or there is no batch.
        OptionError: `outputs` gives no kinds of outputs.
    """
    check_outputs(outputs)
    if isinstance(outputs, Taken):
        return outputs
    device = device_of(model)
    parts = first_samples(batches, min(LOOKED_AT, FEW * at_once), at_once)
    with evaluating(model), torch.no_grad():
        seen = [opened(run(model, to_device(part, device))) for part in parts]
    if not seen:
        raise no_batch()
    return settle(seen, outputs)


def settle(seen: Sequence[Opened], outputs: Outputs = None, labels: Sequence[Tensor | None] = ()) -> Taken:
    """Find the kind of every output: the given one, or a guess.

    Guessed as logits: an output of that name (`logits`, `start_logits`); the first that integer labels fit; rows of
    log-probabilities; and an output of two axes and several columns, unless the mean of a row carries more than a
    twentieth of the variance over samples: the gradient of a cross-entropy sums to zero over the classes, so it has
    no common shift, whereas the outputs of a regression do shift. Twenty columns or more of which each goes its own way
    count as logits in any case: their shift is one direction of many. Guessed as embeddings: outputs of that name
    (`image_embeds`), and rows of norm 1. Anything else is guessed to be values, and so are outputs called pooled,
    hidden or features.

    Args:
        seen: Outputs of some batches.
        outputs: Kinds that the caller gave.
        labels: Labels of the same batches, where there are any.

    Raises:
        DataError: No output holds a floating tensor, or one that `outputs` names is missing or of another shape.
    """
    first = seen[0] if seen else Opened()
    named = outputs if isinstance(outputs, Mapping) else {}
    for name in named:
        if name not in first.tensors:
            raise DataError(
                f"outputs[{name!r}]",
                law="the name of an output",
                got="none of that name",
                cure=near_matches(name, list(first.tensors)),
            )
    counted = list(first.counted(outputs))
    if not counted:
        raise DataError(
            "output",
            law="the model returns a floating tensor, or a tuple, mapping or dataclass that holds one",
            got=", ".join(first.others.values()) or ("none that is not left out" if named else "none"),
            cure="wrap the model so that it returns its logits",
        )
    kinds: dict[str, Output] = {}
    guessed = set()
    labelled = _labelled(first, counted, labels)
    for name in counted:
        kind = named.get(name) if named else outputs if isinstance(outputs, Output) else None
        if kind is None:
            guessed.add(name)
            parts = [each.tensors[name].detach() for each in seen if name in each.tensors]
            kind = labelled.get(name) or _guessed(name, parts)
        kind.check(name, first.tensors[name])
        kinds[name] = kind
    return Taken(kinds, frozenset(guessed), first.passed(counted), outputs)


def _labelled(first: Opened, counted: Sequence[str], labels: Sequence[Tensor | None]) -> dict[str, Output]:
    """The first output that labels fit, as logits along the axis that they lack."""
    label = labels[0] if labels else None
    for name in counted if label is not None else ():
        shape = first.tensors[name].shape
        for axis in dict.fromkeys((len(shape) - 1, 1)) if len(shape) > 1 else ():
            if label is not None and label.shape == (*shape[:axis], *shape[axis + 1 :]) and shape[axis] > 1:
                return {name: Logits(axis=None if axis == class_axis(len(shape)) else axis)}
    return {}


def _guessed(name: str, parts: Sequence[Tensor]) -> Output:
    """Kind of an output, guessed by its name and its values."""
    last = _words(name)[-1]
    if _is_called_logits(name, parts):
        return Logits()
    if not all(_has_columns(part) for part in parts) or len({part.shape[1] for part in parts}) > 1:
        return Values()
    values = torch.cat([part.double() for part in parts])
    of_one = bool(((torch.linalg.vector_norm(values, dim=1) - 1).abs() < NORMALISED).all())
    if EMBEDDED.search(last) or (of_one and bool((values < 0).any())):
        return Embedding()
    if INNER.search(last):
        return Values()
    log_chances = bool((values.logsumexp(1).abs() < NORMALISED).all())
    return Logits() if log_chances or not _shifts(values) else Values()


def _is_called_logits(name: str, parts: Sequence[Tensor]) -> bool:
    """Whether an output is called logits, and has classes: several entries along an axis."""
    shape = parts[0].shape
    return bool(NAMED.fullmatch(_words(name)[-1])) and len(shape) > 1 and shape[class_axis(len(shape))] > 1


def _has_columns(output: Tensor) -> bool:
    """Whether an output has one row per sample, and several columns."""
    return output.ndim == 2 and output.shape[1] > 1


def _shifts(values: Tensor) -> bool:
    """Whether `C Σ_i m_i² > 0.05 Σ_ij z_ij²`, z centred over samples, `m_i` its mean over the C columns of a row.

    Args:
        values: One output, shape (samples, C), float64.
    """
    centred = values - values.mean(0)
    together = centred.mean(1).square().sum() * centred.shape[1]
    return float(together) > SHIFT * float(centred.square().sum())


def output_tensor(output: Any) -> tuple[Tensor, bool]:
    """The tensor by which decisions are made, and whether it is logits: the first of that name, else the first.

    Raises:
        DataError: The output holds no floating tensor.
    """
    found = opened(output).counted()
    for name, tensor in found.items():
        if _is_called_logits(name, [tensor]):
            return tensor, True
    if not found:
        raise DataError(
            "output",
            law="the model returns a floating tensor, or a tuple, mapping or dataclass that holds one",
            got=type(output).__name__,
            cure="wrap the model so that it returns its logits",
        )
    tensor = next(iter(found.values()))
    return tensor, _has_columns(tensor)


def first_samples(batches: Iterable[Batch], samples: int, size: int, *, labels: bool = False) -> Iterator[Batch]:
    """The first samples of some batches, at most `size` of them at once; with their labels if asked for."""
    part_of = with_labels if labels else take
    left = samples
    for batch in batches:
        for chunk in torch.split(torch.arange(min(batch_size(batch), left)), size):
            yield part_of(batch, chunk)
            left -= len(chunk)
        if left <= 0:
            return

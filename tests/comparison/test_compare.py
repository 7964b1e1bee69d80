"""The figures of a comparison against a slow reference, one example at a time in plain Python."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.comparison.compare import labels_of
from rankfold.errors import DataError, NumericsError, OptionError
from rankfold.outputs.taken import output_tensor


class Fixed(nn.Module):
    """Gives the outputs it was made with, in order of its calls."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, x: Any = None, **inputs: Any) -> Any:
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _slow(first: list[list[float]], second: list[list[float]], labels: list[int] | None = None) -> dict[str, Any]:
    """Every figure by its definition."""

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(value) for value in row)
        return [math.exp(value) / total for value in row]

    def ranked(row: list[float]) -> list[int]:
        return sorted(range(len(row)), key=lambda i: -row[i])

    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    result = {
        "agreement": sum(ranked(a)[0] == ranked(b)[0] for a, b in pairs) / n,
        "changed": tuple(i for i, (a, b) in enumerate(pairs) if ranked(a)[0] != ranked(b)[0]),
        "kl": sum(sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True)) for a, b in pairs) / n,
        "relative_error": sum((x - y) ** 2 for a, b in pairs for x, y in zip(a, b, strict=True))
        / sum(x * x for a in first for x in a),
        "max_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
    }
    if labels is not None:
        for name, count in (("top1", 1), ("top5", 5)):
            result[name] = tuple(
                sum(label in ranked(row)[:count] for row, label in zip(rows, labels, strict=True)) / n
                for rows in (first, second)
            )
        result["perplexity"] = tuple(
            math.exp(-sum(math.log(softmax(row)[label]) for row, label in zip(rows, labels, strict=True)) / n)
            for rows in (first, second)
        )
    return result


def test_every_figure_equals_the_slow_reference() -> None:
    first = [_draw(size, 9, seed=size) for size in (4, 7, 1)]
    second = [output + 0.8 * _draw(*output.shape, seed=50) for output in first]
    labels = [torch.arange(len(output)) % 9 for output in first]
    data = [(torch.zeros(len(output), 2), label) for output, label in zip(first, labels, strict=True)]
    seen = rf.compare(Fixed(first), Fixed(second), data)
    slow = _slow(
        [row for output in first for row in output.tolist()],
        [row for output in second for row in output.tolist()],
        [int(label) for each in labels for label in each],
    )
    assert seen.samples == seen.examples == 12
    assert 0 < seen.agreement < 1
    assert seen.changed == slow["changed"]
    for name in ("agreement", "kl", "relative_error", "max_difference", "top1", "top5"):
        assert getattr(seen, name) == pytest.approx(slow[name], rel=1e-6), name
    assert seen.perplexity is None
    assert seen.logits
    lost, there = 0.0, 0.0
    for z, w in zip(torch.cat(first).double().tolist(), torch.cat(second).double().tolist(), strict=True):
        whole = sum(math.exp(value) for value in z)
        q = [0.5 * math.exp(value) / whole + 0.5 / 9 for value in z]  # half the softmax, half even

        def variance(values: list[float], q: list[float] = q) -> float:
            mean = sum(chance * value for chance, value in zip(q, values, strict=True))
            return sum(chance * (value - mean) ** 2 for chance, value in zip(q, values, strict=True))

        lost += variance([y - x for x, y in zip(z, w, strict=True)])
        there += variance(z)
    assert seen.divergence == pytest.approx(lost / there, rel=1e-6)


def test_a_model_against_itself_differs_in_nothing() -> None:
    model = nn.Linear(4, 6)
    seen = rf.compare(model, model, [torch.randn(5, 4)], outputs=rf.Logits())
    assert (seen.agreement, seen.kl, seen.relative_error, seen.max_difference) == (1.0, 0.0, 0.0, 0.0)
    assert seen.changed == ()
    assert seen.top1 is None
    assert seen.top5 is None


def _sequence_figures(batch: Any, rows: slice, labels: list[int]) -> None:
    first, second = _draw(1, 5, 8, seed=1), _draw(1, 5, 8, seed=2)
    seen = rf.compare(Fixed([{"logits": first}]), Fixed([{"logits": second}]), [batch])
    slow = _slow(first[0, rows].tolist(), second[0, rows].tolist(), labels)
    assert seen.samples == 1
    assert seen.examples == 5
    assert seen.perplexity == pytest.approx(slow["perplexity"], rel=1e-6)
    assert seen.top1 == pytest.approx(slow["top1"])
    assert seen.top5 == pytest.approx(slow["top5"])


TOKENS = torch.tensor([[3, 1, 7, 2, 5]])


def test_tokens_as_their_own_labels_are_predicted_from_the_position_before() -> None:
    _sequence_figures({"input_ids": TOKENS, "labels": TOKENS.clone()}, slice(0, 4), [1, 7, 2, 5])
    _sequence_figures((TOKENS, TOKENS.clone()), slice(0, 4), [1, 7, 2, 5])


def test_padding_in_the_labels_is_left_out() -> None:
    labels = TOKENS.clone()
    labels[0, 3:] = -100
    _sequence_figures({"input_ids": TOKENS, "labels": labels}, slice(0, 2), [1, 7])


def test_labels_that_are_not_the_tokens_stand_where_they_are_predicted() -> None:
    shifted = torch.tensor([[1, 7, 2, 5, 0]])
    _sequence_figures((TOKENS, shifted), slice(0, 5), [1, 7, 2, 5, 0])
    _sequence_figures({"input_ids": TOKENS, "labels": shifted}, slice(0, 5), [1, 7, 2, 5, 0])


def test_a_hopeless_perplexity_is_still_a_number() -> None:
    logits = torch.zeros(1, 2, 8)
    logits[..., 0] = 1e6
    seen = rf.compare(Fixed([logits]), Fixed([logits]), [(torch.tensor([[1, 2]]), torch.tensor([[3, 4]]))])
    assert seen.perplexity == (math.exp(700), math.exp(700))


def test_top_5_of_five_classes_says_nothing_and_is_left_out() -> None:
    outputs = [_draw(6, 5, seed=0)]
    assert rf.compare(Fixed(outputs), Fixed(outputs), [(torch.zeros(6, 1), torch.zeros(6).long())]).top5 is None


def test_outputs_that_are_no_logits_diverge_by_their_relative_error() -> None:
    first, second = _draw(2, 3, 4, 4, seed=0), _draw(2, 3, 4, 4, seed=1)
    seen = rf.compare(Fixed([first]), Fixed([second]), [torch.zeros(2, 1)])
    assert not seen.logits
    expected = float((first - second).double().square().sum() / first.double().square().sum())
    assert seen.divergence == seen.relative_error == pytest.approx(expected)


def test_scalars_a_sample_are_compared() -> None:
    seen = rf.compare(Fixed([torch.tensor([1.0, -2.0])]), Fixed([torch.tensor([1.0, -1.0])]), [torch.zeros(2, 1)])
    assert seen.max_difference == 1.0
    assert seen.relative_error == pytest.approx(1 / 5)


def test_zero_outputs_have_a_finite_error() -> None:
    zero = [torch.zeros(2, 3)]
    assert rf.compare(Fixed(zero), Fixed(zero), [torch.zeros(2, 1)]).relative_error == 0.0
    assert rf.compare(Fixed(zero), Fixed([torch.ones(2, 3)]), [torch.zeros(2, 1)]).relative_error == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_floating_dtype_are_compared_in_float64(dtype: torch.dtype) -> None:
    outputs = [_draw(4, 6, seed=0).to(dtype)]
    assert rf.compare(Fixed(outputs), Fixed(outputs), [torch.zeros(4, 1)], outputs=rf.Logits()).kl == 0.0


def test_modes_are_left_as_they_were() -> None:
    first, second = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train(), nn.Linear(4, 4).eval()
    rf.compare(first, second, [torch.randn(3, 4)])
    assert first.training
    assert first[0].training
    assert not second.training


def test_json_holds_every_figure() -> None:
    outputs = [_draw(4, 9, seed=0)]
    seen = rf.compare(Fixed(outputs), Fixed(outputs), [(torch.zeros(4, 1), torch.arange(4))])
    value = json.loads(json.dumps(seen.to_json()))
    assert value["agreement"] == 1.0
    assert value["top1"] == list(seen.top1 or ())
    assert value["changed"] == []


def test_outputs_of_two_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"output · both models give outputs of one shape · got \(2, 3\) and \(2, 4\)"):
        rf.compare(Fixed([torch.zeros(2, 3)]), Fixed([torch.zeros(2, 4)]), [torch.zeros(2, 1)])


def test_a_label_beyond_the_classes_is_refused_with_its_batch() -> None:
    outputs = [_draw(2, 3, seed=0)]
    data = [(torch.zeros(2, 1), torch.tensor([0, 1])), (torch.zeros(2, 1), torch.tensor([0, 3]))]
    with pytest.raises(DataError, match=r"every label is below the 3 entries .* · got 3 in batch 2 · give the labels"):
        rf.compare(Fixed(outputs), Fixed(outputs), data)


@pytest.mark.parametrize(("bad", "whose"), [((True, False), "original"), ((False, True), "compressed")])
def test_outputs_that_are_not_finite_name_the_model_and_the_batch(bad: tuple[bool, bool], whose: str) -> None:
    fine, broken = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, float("nan")]] * 2)
    first, second = ([fine, broken if is_bad else fine] for is_bad in bad)
    with pytest.raises(NumericsError, match=rf"output of the {whose} model · every output is finite · .* in batch 2"):
        rf.compare(Fixed(first), Fixed(second), [torch.zeros(2, 1)] * 2)


def test_the_compared_tensor_is_the_logits_or_the_first_floating_one() -> None:
    logits, other = torch.zeros(2, 3), torch.ones(2, 3, 4)
    assert output_tensor(logits) == (logits, True)
    assert output_tensor(other)[1] is False
    assert output_tensor({"hidden": other, "logits": logits})[0] is logits
    assert output_tensor((torch.ones(2).long(), other))[0] is other
    assert output_tensor([logits])[1] is True
    with pytest.raises(DataError, match=r"returns a floating tensor.* · got int · wrap the model"):
        output_tensor(3)


def test_labels_are_integers_in_second_place_or_by_name() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2).long()
    assert labels_of((x, y)) is y
    assert labels_of({"x": x, "labels": y}) is y
    for batch in (x, (x,), {"x": x}, (x, x), (x, y.bool())):
        assert labels_of(batch) is None


def test_labels_of_a_large_batch_tell_its_logits() -> None:
    outputs = 9 + torch.randn(50, 4, generator=torch.Generator().manual_seed(0))  # that shift as values do
    model = Fixed([outputs])
    seen = rf.compare(model, model, [(torch.zeros(50, 1), torch.zeros(50).long())])
    assert seen.outputs[0].kind == "logits"
    assert seen.top1 == (pytest.approx(float((outputs.argmax(1) == 0).float().mean())),) * 2


def test_one_label_for_a_large_batch_is_named() -> None:
    model = Fixed([torch.randn(50, 4, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(DataError):
        rf.compare(model, model, [(torch.zeros(50, 1), torch.tensor(3))])


def test_every_output_counts_alike() -> None:
    first, second = torch.full((4, 3), 100.0), torch.ones(4, 5)
    dense, other = Fixed([(first, second)]), Fixed([(first * 1.01, second * 1.5)])
    seen = rf.compare(dense, other, [torch.zeros(4, 1)])
    assert [output.name for output in seen.outputs] == ["[0]", "[1]"]
    assert [output.relative_error for output in seen.outputs] == pytest.approx([1e-4, 0.25])
    assert seen.relative_error == pytest.approx((1e-4 + 0.25) / 2)
    assert [output.relative_error for output in rf.compare(dense, dense, [torch.zeros(4, 1)]).outputs] == [0.0, 0.0]
    with pytest.raises(DataError, match="same tensors on every batch"):
        rf.compare(dense, Fixed([first]), [torch.zeros(4, 1)])


class Tokens(nn.Module):
    """Logits of every position, by a table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(_draw(50, 50, seed=seed))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.table[input_ids]


@pytest.mark.parametrize("kind", [rf.Logits(), rf.Values(), rf.Embedding()])
@pytest.mark.parametrize("at_once", [1, 3])
def test_samples_at_once_and_parts_of_outputs_change_no_figure(
    kind: rf.Output, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(50, (8, 5), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "labels": part} for part in ids.split(5)] if isinstance(kind, rf.Logits) else [ids]
    first, second = (Tokens(seed) if isinstance(kind, rf.Logits) else nn.Embedding(50, 11) for seed in (1, 2))
    whole = rf.compare(first, second, data, outputs=kind)
    monkeypatch.setattr("rankfold.outputs.kinds.LARGE", 110)  # two rows of fifty, or ten of eleven
    parts = rf.compare(first, second, data, outputs=kind, at_once=at_once)
    assert (parts.samples, parts.examples, parts.changed) == (whole.samples, whole.examples, whole.changed)
    for mine, theirs in zip(parts.outputs, whole.outputs, strict=True):
        assert mine.divergence == pytest.approx(theirs.divergence, rel=1e-12)
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=1e-12)
        assert (mine.agreement, mine.kl) == (theirs.agreement, pytest.approx(theirs.kl) if theirs.kl else theirs.kl)
    assert parts.top1 == whole.top1
    assert parts.perplexity == (pytest.approx(whole.perplexity) if whole.perplexity else None)


def test_parts_of_a_batch_read_its_labels_as_the_whole_does() -> None:
    """Masked tokens, of which two samples keep theirs: no part of it passes for a causal language model."""
    ids = torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 2] = (ids[:, 2] + 1) % 50
    labels[:2, 2] = ids[:2, 2]
    data = [{"input_ids": ids, "labels": labels}]
    whole = rf.compare(Tokens(1), Tokens(2), data, outputs=rf.Logits())
    for at_once in (1, 2, 4):
        parts = rf.compare(Tokens(1), Tokens(2), data, outputs=rf.Logits(), at_once=at_once)
        assert parts.top1 == whole.top1
        assert parts.perplexity == pytest.approx(whole.perplexity)


@pytest.mark.parametrize("at_once", [0, -1, 1.5, "x", True])
def test_at_once_that_is_no_number_of_samples_is_refused(at_once: Any) -> None:
    with pytest.raises(OptionError, match=r"^at_once · an int of at least 1, or None · got"):
        rf.compare(nn.Linear(2, 3), nn.Linear(2, 3), [torch.randn(4, 2)], at_once=at_once)


@pytest.mark.parametrize("labels", [torch.arange(7) % 3, torch.tensor(1)])
def test_a_batch_that_is_cut_still_has_as_many_labels_as_samples(labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"as many labels as samples · got \d labels .* for 8 samples"):
        rf.compare(nn.Linear(2, 3), nn.Linear(2, 3), [(torch.randn(8, 2), labels)], outputs=rf.Logits(), at_once=4)

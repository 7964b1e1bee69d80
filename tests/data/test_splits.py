"""Calibration data: re-iterable, split without loss, identified by its bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.data.splits import HELD_OUT, Part, Split, as_batches, digest, merged, numbered
from rankfold.errors import DataError

BATCHES = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def batches_of(sizes: list[int]) -> list[Tensor]:
    """Batches whose samples are 0, 1, 2, … ."""
    return list(torch.arange(sum(sizes)).float().reshape(-1, 1).split(sizes))


@given(BATCHES, st.integers(2, 5))
def test_the_two_parts_are_all_samples_once(sizes: list[int], every: int) -> None:
    data = batches_of(sizes)
    parts = [[int(x) for batch in Split(data, every, held_out=held) for x in batch] for held in (False, True)]
    assert sorted(parts[0] + parts[1]) == list(range(sum(sizes)))
    assert parts[1] == [i for i in range(sum(sizes)) if i % every == every - 1]
    assert all(len(batch) > 0 for batch in Split(data, every, held_out=True))


@given(BATCHES)
def test_batches_of_a_part_keep_their_numbers(sizes: list[int]) -> None:
    data = batches_of(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for number, batch in numbered(Split(data, 3, held_out=True)):
        first = int(batch[0])
        assert starts[number - 1] <= first < starts[number - 1] + sizes[number - 1]
    assert [number for number, _ in numbered(data)] == list(range(1, len(sizes) + 1))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(2, 5))
def test_a_part_is_from_everywhere_and_holds_out_what_the_whole_does(sizes: list[int], every: int) -> None:
    part = Part(batches_of(sizes), every)
    samples = [int(x) for batch in part for x in batch]
    assert samples == [i for i in range(sum(sizes)) if i // HELD_OUT % every == 0]
    held = {int(x) for batch in Split(batches_of(sizes), HELD_OUT, held_out=True) for x in batch}
    assert [samples[i] in held for i in range(len(samples))] == [
        i % HELD_OUT == HELD_OUT - 1 for i in range(len(samples))
    ]
    assert [batch.tolist() for batch in part] == [batch.tolist() for batch in part]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 20))
def test_joined_batches_are_the_same_samples_in_order(sizes: list[int], largest: int) -> None:
    data = batches_of(sizes)
    together = merged(data, largest)
    assert torch.equal(torch.cat(together), torch.cat(data))
    assert all(len(batch) <= max(largest, *sizes) for batch in together)
    assert all(len(a) + len(b) > largest for a, b in itertools.pairwise(together))


def test_only_batches_of_one_kind_are_joined() -> None:
    short, long = torch.zeros(2, 3), torch.zeros(2, 4)
    assert [batch.shape for batch in merged([short, short, long, (long, torch.zeros(2))], 99)] == [(4, 3), (4, 4)]
    words = {"ids": torch.zeros(2, 3), "mask": torch.ones(2, 3), "causal": True}
    (one,) = merged([words, words], 99)
    assert (one["ids"].shape, one["mask"].shape, one["causal"]) == ((4, 3), (4, 3), True)
    assert len(merged([words, words | {"causal": False}], 99)) == 2
    assert len(merged([words, {"ids": torch.zeros(2, 3)}], 99)) == 2
    table = words | {"table": torch.zeros(5, 5)}
    assert len(merged([table, table], 99)) == 2
    assert len(merged([{"ids": short.long()}, {"ids": short}], 99)) == 2


def test_a_split_can_be_walked_again() -> None:
    split = Split(batches_of([4, 4]), 2, held_out=False)
    assert [batch.tolist() for batch in split] == [batch.tolist() for batch in split]


def test_splitting_takes_labels_and_keywords_along() -> None:
    batch = {"pixels": torch.arange(4).float(), "scale": 2}
    (part,) = Split([batch], 2, held_out=True)
    assert part["pixels"].tolist() == [1, 3]
    assert part["scale"] == 2


def test_a_bare_tensor_or_dict_is_one_batch() -> None:
    tensor = torch.zeros(3, 2)
    assert as_batches(tensor) == [tensor]
    assert as_batches({"x": tensor}) == [{"x": tensor}]
    data = [tensor, tensor]
    assert as_batches(data) is data


@pytest.mark.parametrize(
    ("data", "law"),
    [
        ((x for x in [torch.zeros(1)]), "re-iterable"),
        (5, "re-iterable"),
        ([], "at least one batch"),
        ([torch.zeros(0, 3)], "at least one sample"),
        ([5], "a batch is"),
        (torch.zeros(0, 3), "at least one sample"),
        ({"x": 5}, "at least one tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_data_is_refused(data: object, law: str) -> None:
    with pytest.raises(DataError, match=law):
        as_batches(data)


def test_a_digest_is_of_values_shapes_dtypes_and_names() -> None:
    tensor = torch.arange(6).float()
    same = digest({"x": tensor.clone(), "flag": True})
    assert digest({"x": tensor, "flag": True}) == same
    for other in (
        {"x": tensor + 1, "flag": True},
        {"x": tensor.reshape(2, 3), "flag": True},
        {"x": tensor.int().view(torch.int32), "flag": True},
        {"y": tensor, "flag": True},
        {"x": tensor, "flag": False},
    ):
        assert digest(other) != same


def test_a_digest_does_not_depend_on_the_layout_in_memory() -> None:
    tensor = torch.arange(6).float().reshape(2, 3)
    assert digest(tensor.mT.contiguous().mT) == digest(tensor)
    assert digest(tensor.bfloat16()) != digest(tensor)

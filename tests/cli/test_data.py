"""Data by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfold.cli import _texts
from rankfold.cli._arrays import array_batches
from rankfold.cli._data import DataSpec, Limited, notes_of
from rankfold.cli._data_options import DataOptions, spread
from rankfold.cli._errors import UsageError
from rankfold.cli._texts import text_batches
from rankfold.errors import DataError, DependencyError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
FLOAT = torch.float32


def options(**changes: Any) -> DataOptions:
    plain: dict[str, Any] = {"batch_size": None, "limit": None, "size": 8, "length": 4}
    return DataOptions.parse(**{**plain, "mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", **changes})


def opened(text: object, chosen: DataOptions, **changes: Any) -> list[Any]:
    plain: dict[str, Any] = {"tokenizer": None, "dtype": FLOAT, "labels": True, "causal": False}
    return list(DataSpec.parse(str(text), chosen).open(chosen, **{**plain, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one grey each, 0, 20, … 180, in two sub-folders, and a file that is none."""
    for index in range(10):
        file = tmp_path / "images" / f"class{index // 5}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (20 * index,) * 3).save(file)
    (tmp_path / "images" / "readme.txt").write_text("no image")
    return tmp_path / "images"


def test_images_come_in_the_order_of_their_names_normalised(folder: Path) -> None:
    batches = opened(folder, options(batch_size=4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    grey = torch.arange(10) * 20 / 255
    assert torch.allclose(torch.cat(batches).mean((1, 2, 3)), (grey - 0.5) / 0.5, atol=1e-6)


def test_the_middle_square_of_an_image_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (batch,) = opened(tmp_path, options(size=4, mean="0,0,0", std="1,1,1"))
    assert torch.equal(batch, torch.ones(1, 3, 4, 4))


def test_one_mean_makes_grey_images(folder: Path) -> None:
    (batch,) = opened(folder, options(mean="0", std="1"))
    assert batch.shape == (10, 1, 8, 8)


def test_a_limit_takes_evenly_spaced_images(folder: Path) -> None:
    (batch,) = opened(folder, options(limit=5, mean="0,0,0", std="1,1,1"))
    assert (batch.mean((1, 2, 3)) * 255).round().tolist() == [0, 40, 80, 120, 160]


@pytest.mark.parametrize(("limit", "used"), [(None, "all of them"), (5, r"5 of them, evenly spaced \(--limit\)")])
def test_how_many_images_were_found_and_used_is_said(limit: int | None, used: str, folder: Path) -> None:
    chosen = options(limit=limit)
    data = DataSpec.parse(str(folder), chosen).open(chosen, tokenizer=None, dtype=FLOAT, labels=False, causal=False)
    (note,) = notes_of(data)
    assert re.fullmatch(f"10 images were found in .*images and its sub-folders; {used} were used", note)


def test_a_second_pass_gives_the_same_images(folder: Path) -> None:
    chosen = options(batch_size=3)
    data = DataSpec.parse(str(folder), chosen).open(chosen, tokenizer=None, dtype=FLOAT, labels=False, causal=False)
    first, second = list(data), list(data)
    assert len(data) == len(first) == 4  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_image_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        opened(folder, options())


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder of images"):
        opened(tmp_path, options())


def test_missing_pillow_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DependencyError, match=r"pip install 'rankfold\[images\]'"):
        opened(folder, options())


@pytest.mark.parametrize("name", ["inputs", "x", "images"])
def test_one_array_of_an_npz_is_the_input_beside_its_labels(name: str, tmp_path: Path) -> None:
    rows = np.arange(10.0)[:, None] * np.ones(3)
    np.savez(tmp_path / "data.npz", **{name: rows, "labels": np.arange(10, dtype=np.uint8)})
    batches = opened(tmp_path / "data.npz", options(batch_size=4))
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.dtype == FLOAT
    assert labels.dtype == torch.int64
    assert torch.equal(inputs[:, 0].long(), labels)
    bare = opened(tmp_path / "data.npz", options(), labels=False)
    assert torch.equal(bare[0], inputs)


def test_several_arrays_of_an_npz_are_keyword_arguments(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", left=np.ones((5, 2)), right=np.ones((5, 2)), labels=np.arange(5))
    (batch,) = opened(tmp_path / "data.npz", options(), labels=False)
    assert sorted(batch) == ["left", "right"]
    (batch,) = opened(tmp_path / "data.npz", options())
    assert sorted(batch) == ["labels", "left", "right"]


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
@pytest.mark.parametrize("names", [None, ("image",), ("x",)], ids=str)
def test_whole_numbers_named_as_labels_are_the_labels_of_the_one_array(
    name: str, names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((5, 2)), **{name: np.arange(5)})
    ((inputs, labels),) = opened(tmp_path / "data.npz", options(), names=names)
    assert inputs.shape == (5, 2)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    (bare,) = opened(tmp_path / "data.npz", options(), names=names, labels=False)
    assert torch.equal(bare, inputs)


def test_arrays_named_as_arguments_of_the_forward_are_keywords_whatever_they_hold(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((5, 2)), y=np.arange(5))
    (batch,) = opened(tmp_path / "data.npz", options(), names=("x", "y"))
    assert sorted(batch) == ["x", "y"]


def test_one_array_that_is_no_argument_of_the_forward_is_its_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", photographs=np.ones((5, 2)))
    (batch,) = opened(tmp_path / "data.npz", options(), names=("pixels",))
    assert batch.shape == (5, 2)


def test_an_array_beside_others_that_is_no_argument_is_refused_with_those_that_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((5, 2)), y=np.ones((5, 2)))
    with pytest.raises(DataError, match=r"like arguments of the model's forward · got 'y' beside 'x' · .* takes x\."):
        opened(tmp_path / "data.npz", options(), names=("x",))


def test_a_npy_is_one_array_of_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.arange(10.0)[:, None] * np.ones(3))
    batches = opened(tmp_path / "data.npy", options(batch_size=4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3), (4, 3), (2, 3)]
    assert batches[0].dtype == FLOAT


@pytest.mark.parametrize("array", [np.array([None, {}], dtype=object), None], ids=["objects", "no array"])
def test_a_npy_of_something_else_is_refused_and_never_unpickled(array: Any, tmp_path: Path) -> None:
    if array is None:
        (tmp_path / "data.npy").write_bytes(b"no array")
    else:
        np.save(tmp_path / "data.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=r"a \.npy of one plain array · .* · write it with numpy\.save"):
        opened(tmp_path / "data.npy", options())


def test_a_limit_takes_evenly_spaced_rows(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(9))
    assert opened(tmp_path / "data.npz", options(limit=3))[0].tolist() == [0, 3, 6]


def test_floats_of_an_npz_take_the_dtype_of_the_weights_and_ints_stay(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", left=np.ones((5, 2)), right=np.ones((5, 2), dtype=np.int32))
    (batch,) = array_batches(tmp_path / "data.npz", options(), torch.bfloat16, labels=False)
    assert (batch["left"].dtype, batch["right"].dtype) == (torch.bfloat16, torch.int32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array"),
        ({"x": np.ones((0, 3))}, "one row a sample"),
        ({"x": np.float64(3)}, "one row a sample"),
        ({"tokens": np.ones(7), "offsets": np.ones(2)}, r"tokens \(7,\), offsets \(2,\)"),
        ({"x": np.array(["a", "b"])}, "arrays of numbers"),
        ({"x": np.array([None, {}], dtype=object)}, "plain arrays"),
    ],
)
def test_an_npz_of_something_else_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "data.npz", options())


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_broken_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match="plain arrays"):
        opened(tmp_path / "data.npz", options())


def test_a_factory_gives_its_own_batches_and_a_limit_cuts_the_last() -> None:
    assert [len(batch) for batch in opened("cli_networks:images", options())] == [8, 8, 8, 8]
    limited = opened("cli_networks:labelled", options(limit=13))
    assert [(len(batch[0]), len(batch[1])) for batch in limited] == [(8, 8), (5, 5)]


def test_a_limit_reads_no_batch_beyond_it() -> None:
    class Counting:
        read = 0

        def __iter__(self) -> Any:
            for _ in range(5):
                self.read += 1
                yield torch.zeros(4, 2)

    data = Counting()
    assert [len(batch) for batch in Limited(data, 8)] == [4, 4]
    assert data.read == 2


def test_a_factory_in_a_file_is_data(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("import torch\ndef batches():\n    return [torch.ones(4, 2)]\n")
    (batch,) = opened(f"{tmp_path / 'data.py'}:batches", options())
    assert batch.shape == (4, 2)


def test_a_batch_size_does_not_go_with_a_factory() -> None:
    with pytest.raises(UsageError, match="leave --batch-size out"):
        DataSpec.parse("cli_networks:images", options(batch_size=4))


def test_a_generator_is_refused() -> None:
    with pytest.raises(DataError, match="only once"):
        opened("cli_networks:stream", options())


@pytest.mark.parametrize("text", ["nowhere.npz", "nowhere/", "two words"])
def test_data_that_is_not_there_is_bad_usage(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the name of data"):
        DataSpec.parse(text, options())


@pytest.mark.parametrize(("mean", "std"), [("0.5", "0.5,0.5,0.5"), ("1,2", "1,2"), ("0", "0"), ("a", "1")])
def test_means_and_deviations_are_one_or_three_numbers(mean: str, std: str) -> None:
    with pytest.raises(UsageError, match="--mean"):
        options(mean=mean, std=std)


def test_spread_is_even_and_never_more_than_there_is() -> None:
    assert spread(10, None) == list(range(10))
    assert spread(10, 99) == list(range(10))
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(0, 4) == []


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A tokenizer that gives each character its code; the list notes how many characters it was given at a time."""
    given: list[int] = []

    def encode(text: str, **_: Any) -> dict[str, list[int]]:
        given.append(len(text))
        return {"input_ids": [ord(character) for character in text]}

    monkeypatch.setattr(_texts, "_tokenizer", lambda path, directory: encode)
    return given


@pytest.mark.usefixtures("letters")
def test_a_text_is_cut_into_blocks_and_the_rest_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd\nfghijk", encoding="utf-8")
    batches = text_batches(tmp_path / "a.txt", options(batch_size=1), tmp_path, labels=False)
    assert ["".join(map(chr, batch["input_ids"][0])) for batch in batches] == ["abcd", "\nfgh"]
    assert all(sorted(batch) == ["attention_mask", "input_ids"] for batch in batches)
    (batch,) = text_batches(tmp_path / "a.txt", options(), tmp_path, labels=True)
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_limit_ends_the_reading_of_a_text_early(letters: list[int], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789\n" * 50_000, encoding="utf-8")
    (batch,) = text_batches(tmp_path / "a.txt", options(limit=3), tmp_path, labels=False)
    assert batch["input_ids"].shape == (3, 4)
    assert sum(letters) < 2 * _texts.READ_CHARACTERS


@pytest.mark.usefixtures("letters")
def test_a_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(DataError, match="got 3 tokens"):
        text_batches(tmp_path / "a.txt", options(), tmp_path, labels=False)


@pytest.mark.usefixtures("letters")
def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="UTF-8"):
        opened(tmp_path / "a.bin", options())


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd", encoding="utf-8")
    with pytest.raises(UsageError, match="tokenizer of a Hugging Face directory"):
        opened(tmp_path / "a.txt", options())

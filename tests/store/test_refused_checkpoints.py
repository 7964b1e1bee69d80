"""A checkpoint that is damaged, or does not fit, is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.checkpoints import OUT, Network, make_network
from torch import nn

import rankfold as rf
import rankfold.store.checkpoint as checkpoint
from rankfold.errors import CheckpointError, ModelError, OptionError, PlanError, WriteError

# What is refused.


def _altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def refused(folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    """`load` and `verify` refuse; the factory is never called."""

    def never() -> nn.Module:
        raise AssertionError("the factory was called")

    with pytest.raises(error, match=message):
        rf.load(folder, factory=never)
    with pytest.raises(error, match=message):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("change", [_altered, _truncated, _emptied])
def test_a_file_with_other_bytes_is_refused(change: Callable[[Path], None], name: str, saved: Path) -> None:
    change(saved / name)
    refused(saved, rf"small/{name} · the file has the checksum .* · got other bytes: truncated or altered · copy the")


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.CHECKSUMS])
def test_a_missing_file_is_refused_by_name(name: str, saved: Path) -> None:
    (saved / name).unlink()
    refused(saved, rf"small/{name} · a checkpoint holds plan\.json, .* · got no such file · copy the whole directory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds valid JSON"),
        ("[]", "checksums of version 1 · got "),
        (
            '{"sha256": {}, "version": 2}',
            r"checksums of version 1 · got .*2.* · load it with the release that wrote it",
        ),
        ('{"sha256": {}, "version": 1}', "got other bytes"),
        ('{"sha256": [], "version": 1}', "checksums of version 1"),
    ],
)
def test_checksums_that_are_none_are_refused(text: str, message: str, saved: Path) -> None:
    (saved / "checksums.json").write_text(text)
    refused(saved, message)


@pytest.mark.parametrize("name", ["plan.json", "report.json", "checksums.json"])
def test_json_of_a_gigabyte_is_refused_by_its_size(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (saved / name).open("wb") as file:
        file.truncate(2**30)

    def never(_: Path) -> str:
        raise AssertionError("a file was read")

    monkeypatch.setattr(checkpoint, "sha256_file", never)
    refused(saved, rf"small/{name} · a JSON file holds at most .* bytes · got {2**30} bytes · .*restore it")


def resign(folder: Path) -> None:
    """Note the checksums anew, as somebody who edits a checkpoint on purpose would."""
    sums = {name: checkpoint.sha256_file(folder / name) for name in checkpoint.FILES}
    (folder / "checksums.json").write_text(json.dumps({"version": 1, "sha256": sums}))


def test_a_plan_of_depth_ten_thousand_is_refused(saved: Path) -> None:
    (saved / "plan.json").write_text("[" * 10_000 + "]" * 10_000)
    resign(saved)
    with pytest.raises(PlanError, match=r"plan\.json · JSON is nested at most 64 deep"):
        rf.load(saved, factory=make_network)


def test_weights_that_do_not_fit_the_plan_are_refused(saved: Path) -> None:
    value = json.loads((saved / "plan.json").read_text())
    value["decisions"][0]["rank"] = 2
    (saved / "plan.json").write_text(json.dumps(value))
    resign(saved)
    with pytest.raises(
        CheckpointError, match=r"(?s)safetensors · the weights fit the structure of the plan · got .*conv\.0\.weight"
    ):
        rf.load(saved, factory=make_network)


def test_weights_that_are_no_safetensors_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\xff" * 64)
    resign(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors · the weights fit"):
        rf.load(saved, factory=make_network)


def test_no_directory_and_a_file_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none · a checkpoint is a directory · got nothing there · pass the directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "a checkpoint is a directory · got a file")


def test_a_factory_of_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(
        PlanError, match=r"^Network · the plan is of a model with the same .* · got fingerprint .* Network"
    ):
        rf.load(saved, factory=lambda: Network(width=9))


def test_the_first_tensor_of_another_shape_or_dtype_is_named(saved: Path) -> None:
    with pytest.raises(
        PlanError, match=r": norm\.weight is torch\.float32 of shape \(8,\) in .*, .* \(9,\) here · make"
    ):
        rf.load(saved, factory=lambda: Network(width=9))
    with pytest.raises(PlanError, match=r": norm\.weight is torch\.float32 .*, torch\.float16 of shape \(8,\) here"):
        rf.load(saved, factory=lambda: make_network().half())


def _fails() -> nn.Module:
    raise KeyError("width")


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return make_network()


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (None, OptionError, r"^factory · a function without arguments · got None · pass a function that builds"),
        (make_network(), OptionError, r"^factory · a function without arguments · got a Network · pass a function"),
        (_fails, ModelError, r"^factory · the factory builds the .* · got KeyError: 'width' · call it alone"),
        (_on_meta, ModelError, r"^conv\.weight · .* on a real device · got a tensor on meta · build it outside"),
    ],
    ids=["none", "module", "fails", "meta"],
)
def test_a_factory_that_builds_nothing_is_refused(
    factory: Any, error: type[Exception], message: str, saved: Path
) -> None:
    with pytest.raises(error, match=message):
        rf.load(saved, factory=factory)


@pytest.mark.parametrize("out", [None, OUT.model], ids=["none", "model"])
def test_what_compress_did_not_return_is_not_saved(out: Any, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"^out · what rankfold\.compress .* · got a .* · pass what compress returned"
    ):
        rf.save(out, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_what_is_no_path_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(OptionError, match=r"^path · the path of a directory · got None · pass a str or a Path"):
        rf.save(OUT, nothing)
    with pytest.raises(OptionError, match=r"^path · the path of a directory · got None · pass a str or a Path"):
        rf.load(nothing, factory=make_network)


@pytest.mark.parametrize(
    ("name", "message"),
    [("n" * 300, r"can be written · got .* · choose a shorter name"), ("n\0n", r"n\\x00n' · a path holds no NUL")],
    ids=["long", "NUL"],
)
def test_a_name_that_no_file_can_have_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=message):
        rf.save(OUT, tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="a checkpoint is a directory"):
        rf.load(tmp_path / name, factory=make_network)


def test_a_factory_that_returns_no_module_is_refused(saved: Path) -> None:
    factory: Any = dict
    with pytest.raises(
        CheckpointError, match=r"small · the factory returns an nn\.Module · got dict · pass a function"
    ):
        rf.load(saved, factory=factory)

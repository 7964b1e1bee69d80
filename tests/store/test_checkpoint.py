"""Laws of checkpoints: the bits that were saved come back, anything else is refused, nothing half-written is left."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
import rankfold.store.checkpoint as checkpoint
from rankfold.comparison.compare import Comparison
from rankfold.cost.resources import Cost
from rankfold.errors import CheckpointError, ModelError, OptionError, PlanError, WriteError

STORED = sorted((Path(__file__).parents[1] / "checkpoints").iterdir())


class Network(nn.Module):
    """A shared layer, a batch norm, a buffer that is not persistent, and tied weights."""

    scale: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.head, self.tied = nn.Linear(width, width), nn.Linear(width, width)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        result: Tensor = self.tied(self.head(self.again(self.first(x).tanh()) * self.scale))
        return result


def make_network() -> nn.Module:
    return Network()


def make_out() -> rf.Compressed:
    """A network by a plan without data, with a report of it."""
    from rankfold.report.data import Report
    from rankfold.sites.finding import fingerprint

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = make_network()
        model(torch.randn(16, 3, 6, 6))  # the batch norm's statistics
    model.eval()
    plan = rf.Plan(
        (rf.Decision("conv", rf.SVD(), 3), rf.Decision("first", rf.SVD(), 2)), (), fingerprint(model), "Network"
    )
    alike = Comparison(1, 1, 1.0, 0.0, 0.0, 0.0, None, None, None, (), True)
    return rf.Compressed(rf.apply(model, plan), plan, Report("Network", (), Cost(), Cost(), {}, None, alike))


OUT = make_out()
INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rf.save(OUT, tmp_path / "small")
    return tmp_path / "small"


def test_the_bits_that_were_saved_come_back(saved: Path) -> None:
    loaded = rf.load(saved, factory=make_network)
    mine, theirs = OUT.model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), OUT.model(INPUTS))


def test_a_loaded_model_is_in_eval_mode_with_its_sharing_and_its_own_buffers(saved: Path) -> None:
    loaded = rf.load(saved, factory=make_network)
    assert not any(module.training for module in loaded.modules())
    assert loaded.first is loaded.again
    assert loaded.tied.weight is loaded.head.weight
    assert torch.equal(loaded.scale, torch.full((1,), 2.0))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_network().to(dtype).eval()
    from rankfold.sites.finding import fingerprint

    plan = rf.Plan((rf.Decision("first", rf.SVD(), 2),), (), fingerprint(model))
    rf.save(rf.Compressed(rf.apply(model, plan), plan, OUT.report), tmp_path / "small")
    loaded = rf.load(tmp_path / "small", factory=lambda: make_network().to(dtype))
    assert loaded.first[0].weight.dtype == dtype
    with pytest.raises(PlanError, match="same parameter names, shapes and dtypes"):
        rf.load(tmp_path / "small", factory=make_network)


def test_a_checkpoint_is_json_and_safetensors_alone(saved: Path) -> None:
    names = sorted(file.name for file in saved.iterdir())
    assert names == ["checksums.json", "model.safetensors", "plan.json", "report.json"]
    assert all(json.loads((saved / name).read_text("utf-8"))["version"] == 1 for name in names if name.endswith("json"))
    assert set(load_file(saved / "model.safetensors")) < set(OUT.model.state_dict())  # shared ones once


def test_equal_plans_and_reports_are_saved_as_equal_bytes(saved: Path, tmp_path: Path) -> None:
    rf.save(make_out(), tmp_path / "again")
    for name in ("plan.json", "report.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


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


# What is left behind.


def test_a_checkpoint_is_replaced_only_when_asked(saved: Path) -> None:
    other = rf.Compressed(copy.deepcopy(OUT.model), OUT.plan, OUT.report)
    with torch.no_grad():
        other.model.first[0].weight.add_(1)
    with pytest.raises(WriteError, match=r"small · the output is a new or empty directory · .* · .*overwrite=True"):
        rf.save(other, saved)
    assert torch.equal(rf.load(saved, factory=make_network).first[0].weight, OUT.model.first[0].weight)
    rf.save(other, saved, overwrite=True)
    assert torch.equal(rf.load(saved, factory=make_network).first[0].weight, other.model.first[0].weight)
    assert [entry.name for entry in saved.parent.iterdir()] == ["small"]


def test_overwriting_loses_nobody_elses_file(saved: Path) -> None:
    (saved / "thesis.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"also holds 'thesis\.txt'"):
        rf.save(OUT, saved, overwrite=True)
    assert (saved / "thesis.txt").read_text() == "mine"
    rf.load(saved, factory=make_network)


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        WriteError, match=r"file/small · the output directory can be written · .*nothing was left behind"
    ):
        rf.save(OUT, tmp_path / "file" / "small")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "can be written · got .*No space left on device"),
        (
            SafetensorError("No space left"),
            "^[^·]*small · the weights can be written · got No space left · check the free",
        ),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "can be written · got .*Read-only file system"),
        (KeyboardInterrupt(), "^$"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_things_as_they_were(
    there: bool, cause: BaseException, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        rf.save(OUT, tmp_path / "small")

    def fails(model: nn.Module, filename: str) -> None:
        Path(filename).write_bytes(b"half")
        raise cause

    monkeypatch.setattr(checkpoint, "save_model", fails)
    expected = KeyboardInterrupt if isinstance(cause, KeyboardInterrupt) else WriteError
    with pytest.raises(expected, match=message):
        rf.save(OUT, tmp_path / "small", overwrite=there)
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"] * there
    if there:
        rf.load(tmp_path / "small", factory=make_network)


KILLED = """
import os, signal, sys
from pathlib import Path
import rankfold as rf
import rankfold.checkpoint as checkpoint
from rankfold.metrics.cost import Cost
from rankfold.report.data import Report
from torch import nn

def killed(model, filename):
    Path(filename).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_model = killed
report = Report("", (), Cost(), Cost(), {})
rf.save(rf.Compressed(nn.Linear(2, 2), rf.Plan((), (), ""), report), sys.argv[1], overwrite=True)
"""


@pytest.mark.slow  # starts a Python with torch
def test_a_kill_in_the_middle_of_an_overwrite_leaves_the_old_checkpoint(saved: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert all(entry.name == "small" or entry.name.startswith(".small.") for entry in saved.parent.iterdir())
    rf.load(saved, factory=make_network)


# Checkpoints of old releases.


@pytest.mark.parametrize("folder", STORED, ids=[folder.name for folder in STORED])
def test_a_stored_checkpoint_loads_for_ever(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("write", folder / "write.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    expected = load_file(folder / "expected.safetensors")
    loaded = rf.load(folder / "small", factory=script.make_model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(expected["inputs"]), expected["outputs"], rtol=1e-5, atol=1e-6)
    dense = rf.merge(loaded, rf.Plan.load(folder / "small" / "plan.json"))
    with torch.no_grad():
        torch.testing.assert_close(dense(expected["inputs"]), expected["outputs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", STORED, ids=[folder.name for folder in STORED])
def test_the_plan_of_a_stored_checkpoint_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "small" / "plan.json", tmp_path)
    assert rf.Plan.load(tmp_path / "plan.json").to_json() == (folder / "small" / "plan.json").read_text("utf-8")

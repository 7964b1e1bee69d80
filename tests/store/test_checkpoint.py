"""What was saved comes back bit by bit, and is on disk whole or not at all."""

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
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.reference.checkpoints import INPUTS, OUT, make_network, make_out
from torch import nn

import rankfold as rf
import rankfold.store.checkpoint as checkpoint
from rankfold.errors import PlanError, WriteError

STORED = sorted((Path(__file__).parents[1] / "checkpoints").iterdir())


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
import rankfold.store.checkpoint as checkpoint
from rankfold.cost.resources import Cost
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

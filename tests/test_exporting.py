"""Files for other runtimes give what the model gives, for any number of samples, or are not there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.digits import calibration, make_model
from rankfold.errors import DependencyError, OptionError, SelfCheckError, TraceError, WriteError

pytestmark = [pytest.mark.usefixtures("mended_torchvision"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Words(nn.Module):
    """Reads tokens and a mask by name, and returns several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 6)

    def forward(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        x = F.gelu(self.inner(self.table(input_ids))) * mask[..., None]
        logits = self.head(x.sum(1))
        return {"logits": logits, "hidden": (x, x.mean(1)), "chosen": logits.argmax(-1)}


def words() -> tuple[nn.Module, Any]:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (5, 7), generator=draws)
    return Words(), {"input_ids": ids, "mask": (torch.rand(5, 7, generator=draws) < 0.8).float()}


def images() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 36, 8)
    )
    return model, torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def compressed(model: nn.Module, batch: Any, family: rf.Family) -> nn.Module:
    return rf.compress(
        model, [batch], families=[family], selector=rf.Uniform(), budget=rf.Budget(params=0.7), repair=None
    ).model


Case = Callable[[], tuple[nn.Module, Any]]


def smaller(case: Case, family: rf.Family) -> Case:
    def made() -> tuple[nn.Module, Any]:
        model, batch = case()
        return compressed(model, batch, family), batch

    return made


CASES: dict[str, Case] = {
    "images": images,
    "words": words,
    "pivoted": smaller(words, rf.Pivoted()),
    "cp": smaller(images, rf.CP()),
    "tucker": smaller(images, rf.Tucker2()),
    "linear train": smaller(words, rf.LinearTrain()),
}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", CASES)
def test_the_file_gives_what_the_model_gives(name: str, suffix: str, tmp_path: Path) -> None:
    model, batch = CASES[name]()
    model.train()
    done = rf.export(model, tmp_path / f"net{suffix}", batch)
    size = len(batch) if isinstance(batch, Tensor) else 5
    assert done.checked == (size, 1, size + 1)
    assert done.difference < 1e-5
    assert done.bytes == (tmp_path / f"net{suffix}").stat().st_size
    assert model.training
    assert sorted(os.listdir(tmp_path)) == [f"net{suffix}"]
    if isinstance(batch, dict):
        assert done.inputs == ("input_ids", "mask")
        assert done.outputs == ("logits", "hidden", "hidden_1", "chosen")


def test_another_number_of_samples_runs_outside(tmp_path: Path) -> None:
    import onnxruntime

    model, batch = images()
    rf.export(model, tmp_path / "net.onnx", batch[:1])
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for size in (1, 3, 6):
        (got,) = session.run(None, {given.name: batch[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(batch[:size]).detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_size(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1) * 2

    with pytest.raises(TraceError, match=r"runs on any number of samples .* dynamic_batch=False"):
        rf.export(Fixed(), tmp_path / "net.onnx", torch.randn(4, 3))
    assert os.listdir(tmp_path) == []
    done = rf.export(Fixed(), tmp_path / "net.onnx", torch.randn(4, 3), dynamic_batch=False)
    assert (done.checked, done.dynamic_batch) == ((4,), False)


def test_a_model_that_torch_cannot_follow(tmp_path: Path) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(TraceError, match=r"torch\.export follows the model for any number of samples"):
        rf.export(Asks(), tmp_path / "net.pt2", torch.ones(4, 3))
    assert os.listdir(tmp_path) == []


def test_heavy_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.exporting.INLINE", 1000)
    model, batch = images()
    done = rf.export(model, tmp_path / "net.onnx", batch)
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert done.bytes == sum((tmp_path / name).stat().st_size for name in os.listdir(tmp_path))


def test_a_checkpoint_is_exported(tmp_path: Path) -> None:
    data = calibration()
    options: dict[str, Any] = {"families": [rf.WhitenedSVD()], "selector": rf.Uniform(), "repair": None}
    out = rf.compress(make_model(), data, budget=rf.Budget(params=0.6), **options)
    rf.save(out, tmp_path / "small")
    again = rf.load(tmp_path / "small", factory=make_model)
    done = rf.export(again, tmp_path / "small.onnx", data[0][:4])
    assert done.bytes < 0.75 * rf.export(make_model(), tmp_path / "whole.onnx", data[0][:4]).bytes


def test_what_gives_something_else_is_not_written(tmp_path: Path) -> None:
    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    for suffix in (".onnx", ".pt2"):
        with pytest.raises(SelfCheckError, match="the file gives what the model gives"):
            rf.export(Drawn(), tmp_path / f"net{suffix}", torch.randn(4, 3))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankfold.exporting.os.replace", full)
    with pytest.raises(WriteError, match="No space left"):
        rf.export(*images_at(tmp_path / "net.pt2"))
    assert os.listdir(tmp_path) == []


def images_at(path: Path) -> tuple[nn.Module, Path, Tensor]:
    model, batch = images()
    return model, path, batch


def test_bad_input_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = images()
    for path, error, said in (
        (tmp_path / "net.tflite", OptionError, r"ends in \.onnx or \.pt2 · got \.tflite"),
        (tmp_path / "net", OptionError, "got no suffix"),
        (tmp_path / "none" / "net.onnx", WriteError, "a directory that is there"),
        (3, OptionError, r"export\.path"),
    ):
        with pytest.raises(error, match=said):
            rf.export(model, path, batch)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"export\.tolerance"):
        rf.export(model, tmp_path / "net.pt2", batch, tolerance=0.0)
    with pytest.raises(OptionError, match=r"'0\.weight' · float32 or float16.* got bfloat16"):
        rf.export(images()[0].bfloat16(), tmp_path / "net.onnx", batch.bfloat16())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DependencyError, match=r"pip install 'rankfold\[onnx\]'"):
        rf.export(model, tmp_path / "net.onnx", batch)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    model, batch = images()
    rf.export(model, tmp_path / "net.pt2", batch)
    before = (tmp_path / "net.pt2").read_bytes()
    with pytest.raises(WriteError, match="overwrite=True"):
        rf.export(model, tmp_path / "net.pt2", batch)
    assert (tmp_path / "net.pt2").read_bytes() == before
    rf.export(nn.Sequential(model, nn.Linear(8, 3)), tmp_path / "net.pt2", batch, overwrite=True)
    assert (tmp_path / "net.pt2").read_bytes() != before

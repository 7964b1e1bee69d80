"""Laws of the training script."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankfold.digits import train
from rankfold.digits.train import correct, moved


def test_the_same_seed_trains_the_same_bits() -> None:
    first, second = (train.train(epochs=1, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_epochs_already_read_most_held_out_scans() -> None:
    right, total = correct(train.train(epochs=2))
    assert right / total > 0.6


def test_moving_keeps_shape_and_range_and_moves_every_scan_its_own_way() -> None:
    images = torch.zeros(16, 1, 8, 8)
    images[:, :, 2:6, 2:6] = 1.0
    result = moved(images, torch.Generator().manual_seed(0))
    assert result.shape == images.shape
    assert 0.0 <= float(result.min()) <= float(result.max()) <= 1.0 + 1e-6
    assert len({image.numpy().tobytes() for image in result}) == 16


def test_the_script_writes_weights_and_a_card_that_tells_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--epochs", "1", "--seed", "7", "--out", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "weights.json").read_text())
    assert (written["epochs"], written["seed"], written["train"]) == (1, 7, 1347)
    weights = load_file(tmp_path / "new" / "weights.safetensors")
    assert set(weights) == set(train.make_model().state_dict())
    assert f"{written['test_correct']} of 450" in capsys.readouterr().out


@pytest.mark.slow
def test_training_again_gives_the_accuracy_of_the_shipped_weights() -> None:
    right, total = correct(train.train())
    assert right / total >= 0.975

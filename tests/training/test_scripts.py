"""The scripts of examples/training on digits: a killed run that goes on ends with the same bits, sizes come out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from examples.training import ordered, train
from examples.training.data import digits, load, moved
from examples.training.loop import STATE, Schedule
from safetensors.torch import load_file

import rankfold as rf

Main = Callable[[Sequence[str]], None]
SMALL = ["--data", "digits", "--network", "resnet20", "--width", "0.25", "--epochs", "3", "--batch", "64"]


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (train.main, []),
        (train.main, ["--penalty", "nuclear", "--share", "0.1"]),
        (train.main, ["--penalty", "orthogonal", "--weight", "0.01", "--bf16"]),
        (ordered.main, ["--lasso", "0.01", "--sizes", "0.7"]),
    ],
    ids=["plain", "nuclear", "orthogonal", "ordered"],
)
def test_stopped_and_resumed_is_not_stopped(main: Main, options: list[str], tmp_path: Path) -> None:
    main([*SMALL, *options, "--out", str(tmp_path / "whole")])
    stopped = [*SMALL, *options, "--out", str(tmp_path / "stopped")]
    main([*stopped, "--until", "1"])
    main([*stopped, "--resume"])
    whole, again = (load_file(tmp_path / name / STATE) for name in ("whole", "stopped"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_penalty_that_is_trained_with_falls_and_the_network_still_reads(tmp_path: Path) -> None:
    found = {}
    for share in ("0.05", "0.5"):
        folder = tmp_path / share
        options = ["--penalty", "second", "--share", share, "--epochs", "6", "--out", str(folder)]
        train.main([*SMALL, *options])
        model, told = train.trained(folder)
        assert told["top1"] > 0.8
        value = train.PENALTIES["second"](1.0, None)(model)
        found[share] = float(value.detach())
    assert found["0.5"] < 0.7 * found["0.05"]


def test_ordered_training_serves_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    ordered.main([*SMALL, "--epochs", "8", "--out", str(tmp_path), "--sizes", "0.8", "0.6"])
    rows = json.loads((tmp_path / "sizes.json").read_text())
    assert [row["asked"] for row in rows] == [0.8, 0.6]
    assert all(0.5 * row["asked"] < row["kept"] <= row["asked"] for row in rows)
    assert rows[0]["top1"] > 0.7


def test_variational_bayes_keeps_fewer_ranks_after_orthogonal_training(tmp_path: Path) -> None:
    """Where it finds no rank above noise, as in most layers that were trained plainly, all ranks stay."""
    kept = {}
    for penalty, options in (("none", []), ("orthogonal", ["--weight", "1e-4"])):
        folder = tmp_path / penalty
        train.main([*SMALL, "--width", "0.5", "--epochs", "12", "--penalty", penalty, *options, "--out", str(folder)])
        model, told = train.trained(folder)
        assert told["top1"] > 0.93
        out = rf.compress(
            model,
            digits().calibration(64),
            families=[rf.Tucker2(whitened=False)],
            selector=rf.EVBMF(weaken=1.0),
            only=["stages.[01].*.conv*"],
            repair=None,
            weighting=False,
        )
        ranks: list[tuple[int, ...]] = [
            decision.rank
            if isinstance(decision.rank, tuple)
            else tuple(model.get_submodule(decision.site).weight.shape[:2])
            for decision in out.plan.decisions
        ]
        kept[penalty] = sum(map(sum, ranks))
    assert kept["orthogonal"] < 0.8 * kept["none"]


def test_what_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.main([*SMALL, "--out", str(tmp_path), "--resume"])
    train.main([*SMALL, "--out", str(tmp_path), "--until", "1"])
    with pytest.raises(FileExistsError, match="go on with --resume"):
        train.main([*SMALL, "--out", str(tmp_path)])
    before = load_file(tmp_path / STATE)
    for options, said in (
        (["--rate", "0.1"], r"'rate': \(0.2, 0.1\)"),
        (["--width", "0.5"], r"'width': \(0.25, 0.5\)"),
        (["--penalty", "second", "--share", "0.1"], r"'penalty': \('none', 'second'\)"),
    ):
        with pytest.raises(ValueError, match=f"the state of another run .*{said}"):
            train.main([*SMALL, *options, "--out", str(tmp_path), "--resume"])
    with pytest.raises(ValueError, match=r"the state of another run .*'lasso': \(None, 0.0001\)"):
        ordered.main([*SMALL, "--out", str(tmp_path), "--resume"])
    assert all(torch.equal(value, before[name]) for name, value in load_file(tmp_path / STATE).items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--until", "4"], "until 4: an epoch from 1 to 3"),
        (["--epochs", "0"], "epochs 0: from 1 to"),
        (["--batch", "2000"], "batch 2000: from 1 to 1347"),
        (["--rate", "-1"], "rate -1.0: a number above 0"),
        (["--width", "0.01"], "width 0.01: from 0.1 to 16"),
    ],
)
def test_what_cannot_be_trained_says_so(options: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        train.main([*SMALL, *options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--weight", "3"], ["--penalty", "second"]])
def test_a_penalty_has_a_weight_and_none_has_none(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train.main([*SMALL, *options, "--out", str(tmp_path)])


def test_data_that_is_not_whole_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither CIFAR-10's"):
        load(str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin: one of the files"):
        load(str(tmp_path))
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(bytes(3073 + number))
    with pytest.raises(ValueError, match=r"data_batch_1\.bin: 3074 bytes are no whole rows"):
        load(str(tmp_path))
    (tmp_path / "sheets" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"labels\.npy; found 0 sheets"):
        load(str(tmp_path / "sheets"))


def test_images_are_moved_and_mirrored_whole() -> None:
    images = torch.arange(2 * 12 * 12).reshape(2, 1, 12, 12)
    seen = moved(images, torch.Generator().manual_seed(0))
    assert seen.shape == images.shape
    assert not torch.equal(seen, images)
    for image, new in zip(images, seen, strict=True):
        kept = new[new > 0]
        assert len(kept) >= 7 * 7
        assert bool(torch.isin(kept, image).all())
        steps = new[0].diff(dim=1)[(new[0, :, 1:] > 0) & (new[0, :, :-1] > 0)]
        assert steps.unique().tolist() in ([1], [-1])


def test_cifar_in_binary_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"):
        rows = torch.randint(256, (3, 3073), generator=generator, dtype=torch.uint8)
        rows[:, 0] = torch.arange(3)
        (tmp_path / name).write_bytes(rows.numpy().tobytes())
    images = load(str(tmp_path))
    assert images.train.shape == (15, 3, 32, 32)
    assert torch.equal(images.test[2].flatten(), rows[2, 1:])
    assert images.train_labels.tolist() == [0, 1, 2] * 5


def test_the_rate_climbs_and_falls() -> None:
    rates = [Schedule(rate=1.0).rate_at(step, 99) for step in range(99)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 29
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[-1] == pytest.approx(1 / 70)


def test_calibration_images_are_drawn_by_a_seed() -> None:
    images = digits()
    one, same, other = (torch.cat(images.calibration(40, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)

"""Laws of the scans: fixed, disjoint, in range, and without labels where none are promised."""

import builtins
from typing import Any

import pytest
import torch

from rankfold.digits import calibration, data, held_out, training
from rankfold.errors import DependencyError


def test_every_scan_is_in_exactly_one_part() -> None:
    images = torch.cat([training()[0], *(batch for batch, _ in held_out())])
    whole, _ = data._scans()
    assert torch.equal(images, whole)
    assert len(whole) == 1797


def test_no_held_out_scan_is_also_a_training_scan() -> None:
    seen = {image.numpy().tobytes() for image in training()[0]}
    unseen = [image.numpy().tobytes() for images, _ in held_out() for image in images]
    assert not seen.intersection(unseen)


def test_grey_values_lie_between_0_and_1() -> None:
    images, labels = training()
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


def test_calibration_is_the_training_scans_without_labels() -> None:
    assert torch.equal(torch.cat(calibration()), training()[0])


def test_changing_what_was_handed_out_changes_nothing_for_the_next_caller() -> None:
    training()[0].zero_()
    held_out()[0][0].zero_()
    calibration()[0].zero_()
    assert float(training()[0].max()) == float(held_out()[0][0].max()) == float(calibration()[0].max()) == 1.0


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> Any:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    data._scans.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"rankfold\[demo\]") as caught:
        training()
    assert isinstance(caught.value, ImportError)

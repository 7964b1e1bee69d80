"""Faults that a norm over all entries does not see, and rounding that is no fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold.comparison.misfit import local_misfit, misfit, relative_difference, tolerance
from rankfold.testing.matrices import normal


def _outputs(offset: float) -> tuple[Tensor, Tensor]:
    """What a network gave before and after a change: five columns that move, and a sixth that is far away."""
    before, after = normal(8, 6, seed=1).float(), normal(8, 6, seed=2).float()
    before[:, 5] = after[:, 5] = offset
    return before, after


@pytest.mark.parametrize("offset", [0.0, -1e9, torch.finfo(torch.float32).min / 2])
def test_a_fault_beside_a_large_constant_is_seen(offset: float) -> None:
    before, after = _outputs(offset)
    wrong = after.clone()
    wrong[:, 2] *= 1.5
    assert local_misfit(wrong, after, before) > 1
    assert local_misfit(after, after, before) == 0
    assert (relative_difference(wrong, after) > tolerance(after.dtype)) == (offset == 0)


def test_a_fault_in_small_entries_beside_large_ones_that_move_is_seen() -> None:
    before, after = _outputs(0.0)
    before[:, :2] *= 3000.0
    after[:, :2] *= 3000.0
    wrong = after.clone()
    wrong[:, 4] *= 1.5
    assert relative_difference(wrong, after) < 1e-3
    assert local_misfit(wrong, after, before) > 1


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_rounding_is_no_fault(scale: float) -> None:
    before, after = (each * scale for each in _outputs(1e3))
    rounded = after + 1e-6 * normal(8, 6, seed=3).float() * after.abs().clamp_min(scale)
    assert local_misfit(rounded, after, before) < 1
    assert local_misfit(rounded, after, after) < 1  # nothing changed at all


def test_one_sample_and_equal_outputs() -> None:
    before, after = (each[:1] for each in _outputs(-1e9))
    assert local_misfit(after, after, after) == 0
    assert local_misfit(after * 1.5, after, before) > 1


def test_probabilities_of_sure_networks_may_round() -> None:
    logits = 20 * normal(8, 6, seed=1).float()
    after = logits.softmax(1)
    rounded = (logits * (1 + 1e-6)).softmax(1)
    assert local_misfit(rounded, after, after * (1 + 1e-5)) < 1  # of a model that hardly changed


def test_an_output_of_one_number() -> None:
    assert local_misfit(torch.tensor(1.5), torch.tensor(1.0), torch.tensor(1.0)) > 1
    assert local_misfit(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.5)) == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_misfit(wrong: float) -> None:
    before, after = _outputs(1.0)
    broken = after.clone()
    broken[0, 0] = wrong
    assert not misfit(broken, after, before).worst <= 1
    assert not misfit(after, broken, before).worst <= 1
    assert misfit(after, after, before).worst <= 1


def test_parts_of_a_large_output_are_looked_at_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = normal(8, 4, 5, seed=1).float(), normal(8, 4, 5, seed=2).float()
    wrong = after.clone()
    wrong[3, 2, 1] += 0.5
    whole = misfit(wrong, after, before)
    monkeypatch.setattr("rankfold.comparison.misfit.LARGE", 24)
    parts = misfit(wrong, after, before)
    assert parts.local == whole.local > 1
    assert parts.difference == pytest.approx(whole.difference, rel=1e-12)


def test_what_is_no_number_is_a_misfit_in_any_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.comparison.misfit.LARGE", 8)
    before, after = normal(8, 6, seed=1).float(), normal(8, 6, seed=2).float()
    wrong = after.clone()
    wrong[0, 0] = float("nan")
    assert not misfit(wrong, after, before).worst <= 1

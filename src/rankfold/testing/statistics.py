"""Laws that every statistic keeps."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rankfold.linalg.precision import work_dtype
from rankfold.registry import names
from rankfold.statistics import InputGram, InputMean, Statistic, Statistics
from rankfold.statistics._base import merge
from rankfold.testing.devices import devices
from rankfold.testing.matrices import normal

_GROUPS, _INPUTS, _OUTPUTS = 2, 7, 5


class StatisticConformance:
    """Every law a statistic keeps. Inherit it, name your class, and run pytest.

    Attributes:
        statistic: Class of the statistic.
        tolerance: Largest difference allowed between float64 sums in different order, relative to the largest.
    """

    statistic: ClassVar[type[Statistic]]
    tolerance: ClassVar[float] = 1e-12

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise by device."""
        if "device" in metafunc.fixturenames:
            metafunc.parametrize("device", devices())

    def collected(self, chunks: list[tuple[Tensor, Tensor]]) -> Statistic:
        """The statistic over some chunks."""
        result = self.statistic()
        for inputs, outputs in chunks:
            result.update(inputs, outputs if result.reads_outputs else None)
        return result

    def assert_close(self, first: Statistic, second: Statistic) -> None:
        """Assert that counts are equal, and sums equal up to the order of addition."""
        assert first.count == second.count
        assert first.total is not None
        assert second.total is not None
        scale = float(second.total.abs().max())
        torch.testing.assert_close(first.total, second.total, rtol=0, atol=self.tolerance * scale)

    def test_it_is_registered(self) -> None:
        """The statistic is registered under its name, so that it can be requested and read back."""
        assert self.statistic.name in names(Statistic)

    def test_merge_equals_collecting_over_both(self, device: str) -> None:
        """`merge(a, b)` is the statistic over the positions of both, in either order; neither part is changed."""
        first, second = _chunk(9, seed=1, device=device), _chunk(4, seed=2, device=device)
        parts = self.collected([first]), self.collected([second])
        kept = [part.total.clone() for part in parts if part.total is not None]
        both = self.collected([first, second])
        self.assert_close(merge(*parts), both)
        self.assert_close(merge(*reversed(parts)), both)
        assert all(torch.equal(a, b.total) for a, b in zip(kept, parts, strict=True) if b.total is not None)

    def test_merging_with_nothing_changes_nothing(self, device: str) -> None:
        """A statistic that has seen no position is the neutral element."""
        part = self.collected([_chunk(9, seed=1, device=device)])
        self.assert_close(merge(part, self.statistic()), part)
        self.assert_close(merge(self.statistic(), part), part)

    def test_merging_two_kinds_is_refused(self) -> None:
        """There is no sum of two different statistics."""
        other = InputMean if self.statistic is InputGram else InputGram
        with pytest.raises(TypeError):
            merge(self.statistic(), other())

    def test_chunks_do_not_matter(self, device: str) -> None:
        """Adding one position at a time gives the same as adding all at once."""
        inputs, outputs = _chunk(13, seed=3, device=device)
        singly = [(inputs[:, i : i + 1], outputs[:, i : i + 1]) for i in range(13)]
        self.assert_close(self.collected(singly), self.collected([(inputs, outputs)]))

    def test_it_counts_positions(self, device: str) -> None:
        """Positions are counted per group; the sum has the groups first, the work dtype and the inputs' device."""
        found = self.collected([_chunk(9, seed=1, device=device), _chunk(4, seed=2, device=device)])
        assert found.count == 13
        assert found.total is not None
        assert found.total.shape[0] == _GROUPS
        assert found.total.dtype == work_dtype(torch.device(device))
        assert found.total.device.type == device

    def test_groups_do_not_mix(self, device: str) -> None:
        """A group's part is the statistic of that group alone."""
        inputs, outputs = _chunk(9, seed=4, device=device)
        whole = self.collected([(inputs, outputs)]).mean()
        for group in range(_GROUPS):
            part = slice(group, group + 1)
            alone = self.collected([(inputs[part], outputs[part])]).mean()
            torch.testing.assert_close(whole[part], alone, rtol=1e-9, atol=self.tolerance)

    def test_inputs_are_not_kept(self, device: str) -> None:
        """Later changes of a chunk do not change the statistic, and the chunk itself is not changed."""
        inputs, outputs = _chunk(9, seed=5, device=device)
        copies = inputs.clone(), outputs.clone()
        found = self.collected([(inputs, outputs)])
        assert found.total is not None
        before = found.total.clone()
        assert torch.equal(inputs, copies[0])
        assert torch.equal(outputs, copies[1])
        inputs.zero_(), outputs.zero_()
        assert torch.equal(found.total, before)

    def test_scaled_inputs_scale_the_statistic(self, device: str) -> None:
        """Values of scale 1e±20 in float32 neither overflow nor vanish: a power of the scale comes out."""
        inputs, outputs = (part.float() for part in _chunk(9, seed=6, device=device))
        plain = self.collected([(inputs, outputs)]).mean()
        for scale in (1e20, 1e-20):
            scaled = self.collected([(inputs * scale, outputs * scale)]).mean()
            assert bool(torch.isfinite(scaled).all())
            power = torch.log10(scaled.abs().max() / plain.abs().max()) / torch.tensor(scale).log10()
            assert float(power) == pytest.approx(round(float(power)), abs=0.01)
            assert round(float(power)) >= 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_finite_on_the_largest_values_of_a_dtype(self, dtype: torch.dtype, device: str) -> None:
        """Sums are taken in a wider dtype than the values."""
        largest = torch.finfo(dtype).max
        inputs, outputs = (torch.full_like(part, largest, dtype=dtype) for part in _chunk(9, seed=7, device=device))
        found = self.collected([(inputs, outputs)]).mean()
        assert bool(torch.isfinite(found).all())
        assert float(found.abs().max()) > 0

    def test_zeros_give_zeros(self, device: str) -> None:
        """The statistic of zeros is zero."""
        inputs, outputs = (torch.zeros_like(part) for part in _chunk(9, seed=8, device=device))
        assert float(self.collected([(inputs, outputs)]).mean().abs().max()) == 0

    def test_saved_and_loaded_it_has_the_same_bits(self, device: str, tmp_path: Path) -> None:
        """The statistic keeps its bits through safetensors and JSON."""
        found = self.collected([_chunk(9, seed=9, device=device)])
        Statistics({"layer": {found.name: found}}, {"samples": 9}, "abc").save(tmp_path / "statistics")
        again = Statistics.load(tmp_path / "statistics").sites["layer"][found.name]
        assert type(again) is self.statistic
        assert again.count == found.count
        assert again.total is not None
        assert found.total is not None
        assert torch.equal(again.total, found.total.cpu())

    def test_a_mean_of_nothing_is_an_error(self) -> None:
        """There is no average of no positions."""
        with pytest.raises(ValueError, match=self.statistic.name):
            self.statistic().mean()


def _chunk(positions: int, *, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of some positions, groups first."""
    inputs = normal(_GROUPS, positions, _INPUTS, seed=seed, device=device)
    return inputs, normal(_GROUPS, positions, _OUTPUTS, seed=seed + 100, device=device)

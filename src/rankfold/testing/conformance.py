"""The conformance cases: the contract of every axis, as a check that ships with the package."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rankfold.testing.decompositions import WeightLaws
from rankfold.testing.devices import devices
from rankfold.testing.matrices import HARD_WEIGHTS, MOMENTS
from rankfold.testing.shells import ShellLaws


class DecompositionConformance(WeightLaws, ShellLaws):
    """Every law a decomposition keeps. Inherit it, name your method, and run pytest:

        class TestMyMethod(rankfold.testing.DecompositionConformance):
            method = MyMethod()

    All cases run on the CPU and, where there is one, on a CUDA device.

    Attributes:
        method: An instance of the method; make one class for each interesting combination of options.
        shapes: Canonical shapes that the laws are checked on; those the method refuses are left out.
        layers: Names of the toy layers that the laws are checked on; those the method refuses are left out.
        variations: Another value of each option that is no bool, int or float, for the law that it changes something.
        idle: Names of the options that this instance is documented not to read.
        tolerance: Largest difference allowed between two float64 results, relative to their size.
    """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise by device, by the hard inputs, and by the options of the method."""
        options = [field.name for field in dataclasses.fields(self.method)]  # type: ignore[arg-type]
        choices: dict[str, list[Any]] = {
            "device": devices(),
            "weight_kind": list(HARD_WEIGHTS),
            "moments_kind": list(MOMENTS if self.method.needs else MOMENTS[:1]),
            "option": [name for name in options if name not in self.idle],
        }
        for name, values in choices.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

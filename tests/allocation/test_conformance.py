"""Every selector of ours keeps the laws that rankfold.testing ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rankfold.allocation import Energy, HalfWay, Lagrangian, Option, Rounded, Uniform
from rankfold.testing import SelectorConformance


class TestLagrangian(SelectorConformance):
    selector = Lagrangian()


class TestEnergy(SelectorConformance):
    selector = Energy()


class TestUniform(SelectorConformance):
    selector = Uniform()
    variations: ClassVar = {"spared": 0.5}


class TestHalfWay(SelectorConformance):
    selector = HalfWay()
    variations: ClassVar = {"evenness": 0.25}


class TestRounded(SelectorConformance):
    selector = Rounded(multiple=4)
    variations: ClassVar = {"multiple": 2, "selector": Uniform()}

    def allowed(self, options: Sequence[Option], option: Option) -> bool:
        return option.rank is None or (isinstance(option.rank, int) and option.rank % 4 == 0)


class TestRoundedUniform(SelectorConformance):
    selector = Rounded(Uniform(), multiple=2)
    variations: ClassVar = {"multiple": 1, "selector": Lagrangian()}

    def allowed(self, options: Sequence[Option], option: Option) -> bool:
        return option.rank is None or (isinstance(option.rank, int) and option.rank % 2 == 0)

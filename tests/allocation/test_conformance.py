"""Every selector of ours keeps the laws that rankfold.testing ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from rankfold.allocation import EVBMF, Energy, HalfWay, Knapsack, Lagrangian, Option, Problem, Rounded, Uniform
from rankfold.decompositions import Spectrum
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


class TestKnapsack(SelectorConformance):
    selector = Knapsack()
    variations: ClassVar = {"states": 1}


class TestEVBMF(SelectorConformance):
    selector = EVBMF()
    variations: ClassVar = {"weaken": 0.5, "noise": "clamp"}

    def problems(self, resources: Sequence[str], **options: Any) -> list[Problem]:
        """The problems with a spectrum for every method at every site: some signal, and much noise."""
        return [_with_spectra(problem, seed) for seed, problem in enumerate(super().problems(resources, **options))]


def _with_spectra(problem: Problem, seed: int) -> Problem:
    spectra = {}
    generator = torch.Generator().manual_seed(seed)
    for site, own in zip(problem.sites, problem.options, strict=True):
        out, inputs, *_ = site.geometry.canonical_shape
        values = torch.linalg.svdvals(torch.randn(out, 4 * inputs, generator=generator, dtype=torch.float64))
        values[: int(torch.randint(0, 3, (), generator=generator))] *= 4
        for option in own[1:]:
            if option.method is not None:
                spectra[site.path, option.method] = ((Spectrum(values.sort(descending=True)[0], out, 4 * inputs),),)
    return replace(problem, spectra=spectra)

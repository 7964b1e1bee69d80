"""Tensor families and weighted relatives keep the laws that rankfold.testing ships."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from rankfold.decompositions import (
    ASVD,
    CP,
    FeaturePCA,
    FisherSVD,
    KroneckerSVD,
    LinearTrain,
    Moments,
    TensorTrain,
    Tucker,
)
from rankfold.testing import DecompositionConformance

FEW = ((12, 20), (20, 12), (8, 6, 3, 3))
FEW_LAYERS = ("linear on tokens", "conv2d grouped", "conv2d same, reflect")


class TestCP(DecompositionConformance):
    method = CP()
    variations: ClassVar = {"sweeps": 1, "largest": 100, "restarts": 8}


class TestPlainCP(DecompositionConformance):
    method = CP(whitened=False)
    variations: ClassVar = {"sweeps": 1, "largest": 100, "restarts": 8}
    shapes, layers = ((4, 20, 3, 3), (9, 4, 2, 3)), FEW_LAYERS
    idle = frozenset({"damping"})


class TestASVD(DecompositionConformance):
    method = ASVD()
    shapes, layers = FEW, FEW_LAYERS


class TestFisherSVD(DecompositionConformance):
    method = FisherSVD()
    shapes, layers = FEW, FEW_LAYERS


class TestKroneckerSVD(DecompositionConformance):
    method = KroneckerSVD()
    shapes, layers = FEW, FEW_LAYERS


class TestFeaturePCA(DecompositionConformance):
    method = FeaturePCA(multiple_of=2)
    shapes, layers = FEW, FEW_LAYERS

    def metric(self, moments: Moments, features: int) -> Tensor:
        return super().metric(replace(moments, bias=True), features)


class TestTensorTrain(DecompositionConformance):
    method = TensorTrain()


class TestTiedTensorTrain(DecompositionConformance):
    method = TensorTrain(separable=False, tied=True)
    shapes, layers = FEW, FEW_LAYERS


class TestPlainTensorTrain(DecompositionConformance):
    method = TensorTrain(whitened=False)
    shapes, layers = ((4, 20, 3, 3), (9, 4, 2, 3)), FEW_LAYERS
    idle = frozenset({"damping"})


class TestTucker(DecompositionConformance):
    method = Tucker()


class TestPlainTucker(DecompositionConformance):
    method = Tucker(whitened=False)
    shapes, layers = ((4, 20, 3, 3), (9, 4, 2, 3)), FEW_LAYERS
    idle = frozenset({"damping"})


class TestLinearTrain(DecompositionConformance):
    method = LinearTrain()
    shapes: ClassVar = ((20, 12), (9, 24), (6, 7, 3, 3))
    layers = ("linear", "linear on tokens", "conv1d")


class TestPlainLinearTrain(DecompositionConformance):
    method = LinearTrain(modes=2, whitened=False)
    variations: ClassVar = {"modes": 3}
    shapes: ClassVar = ((20, 12), (9, 24))
    layers = ("linear on tokens",)
    idle = frozenset({"damping"})

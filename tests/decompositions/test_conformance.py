"""Every method of ours keeps the laws that rankfold.testing ships."""

from __future__ import annotations

from torch import Tensor

from rankfold.decompositions import (
    SVD,
    Moments,
    Pivoted,
    SpatialSVD,
    Tucker2,
    WhitenedSVD,
)
from rankfold.testing import DecompositionConformance

FEW = ((12, 20), (20, 12), (8, 6, 3, 3))
FEW_LAYERS = ("linear on tokens", "conv2d grouped", "conv2d same, reflect")


class TestSVD(DecompositionConformance):
    method = SVD()


class TestMirroredSVD(DecompositionConformance):
    method = SVD(mirrored=True)


class TestWhitenedSVD(DecompositionConformance):
    method = WhitenedSVD()


class TestMirroredWhitenedSVD(DecompositionConformance):
    method = WhitenedSVD(mirrored=True)


class TestSpatialSVD(DecompositionConformance):
    method = SpatialSVD()


class TestPlainSpatialSVD(DecompositionConformance):
    method = SpatialSVD(whitened=False)
    idle = frozenset({"damping"})


class TestTucker2(DecompositionConformance):
    method = Tucker2()


class TestPlainTucker2(DecompositionConformance):
    method = Tucker2(whitened=False)
    shapes = ((8, 6, 3), (4, 20, 3, 3), (9, 4, 2, 3))
    idle = frozenset({"damping", "passes"})


class TestUndampedWhitenedSVD(DecompositionConformance):
    method = WhitenedSVD(damping=0.0)
    shapes, layers = FEW, FEW_LAYERS


class TestUndampedMirroredWhitenedSVD(DecompositionConformance):
    method = WhitenedSVD(mirrored=True, damping=0.0)
    shapes, layers = FEW, FEW_LAYERS


class TestUndampedSpatialSVD(DecompositionConformance):
    method = SpatialSVD(damping=0.0)
    shapes, layers = FEW, FEW_LAYERS


class _Pivoted(DecompositionConformance):
    idle = frozenset({"method"})

    def metric(self, moments: Moments, features: int) -> Tensor:
        inner = self.method
        assert isinstance(inner, Pivoted)
        other = DecompositionConformance()
        other.method = inner.method  # type: ignore[misc]
        return other.metric(moments, features)


class TestPivotedWhitenedSVD(_Pivoted):
    method = Pivoted()


class TestPivotedSVD(_Pivoted):
    method = Pivoted(SVD())


class TestPivotedMirroredSVD(_Pivoted):
    method = Pivoted(SVD(mirrored=True))


class TestPivotedTucker2(_Pivoted):
    method = Pivoted(Tucker2())

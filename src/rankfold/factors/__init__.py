"""What a decomposition returns: the weights of the layers that replace one."""

from rankfold.factors._base import Factors, Rank
from rankfold.factors._pairs import BiasedMatrixFactors, MatrixFactors, MirroredFactors, SpatialFactors
from rankfold.factors._pivoted import PIVOTABLE, PIVOTED, PivotedFactors, Pivots, pivoted_ends
from rankfold.factors._sizes import factored
from rankfold.factors._tensors import CPFactors, FullTuckerFactors, LinearTrainFactors, TrainFactors, joined_parts
from rankfold.factors._tucker import TuckerFactors

__all__ = [
    "PIVOTABLE",
    "PIVOTED",
    "BiasedMatrixFactors",
    "CPFactors",
    "Factors",
    "FullTuckerFactors",
    "LinearTrainFactors",
    "MatrixFactors",
    "MirroredFactors",
    "PivotedFactors",
    "Pivots",
    "Rank",
    "SpatialFactors",
    "TrainFactors",
    "TuckerFactors",
    "factored",
    "joined_parts",
    "pivoted_ends",
]

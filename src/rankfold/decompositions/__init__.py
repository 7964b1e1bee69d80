"""Methods that factorise a canonical weight. They know nothing of layers."""

from rankfold.decompositions._asvd import ASVD
from rankfold.decompositions._base import Decomposition, Family, Moments, Spectrum, judged_energy
from rankfold.decompositions._branches import Branches
from rankfold.decompositions._cp import CP
from rankfold.decompositions._feature_pca import FeaturePCA
from rankfold.decompositions._fisher_svd import FisherSVD
from rankfold.decompositions._interpolative import Interpolative
from rankfold.decompositions._kronecker_svd import KroneckerSVD
from rankfold.decompositions._linear_train import LinearTrain
from rankfold.decompositions._pivoted import Pivoted
from rankfold.decompositions._spatial_svd import SpatialSVD
from rankfold.decompositions._svd import SVD
from rankfold.decompositions._tensor_train import TensorTrain
from rankfold.decompositions._tucker import Tucker
from rankfold.decompositions._tucker2 import Tucker2
from rankfold.decompositions._whitened_svd import WhitenedSVD
from rankfold.decompositions.weighting import damped_gradients, factorise, output_errors, output_root
from rankfold.loading import load_registering

__all__ = [
    "ASVD",
    "CP",
    "SVD",
    "Branches",
    "Decomposition",
    "Family",
    "FeaturePCA",
    "FisherSVD",
    "Interpolative",
    "KroneckerSVD",
    "LinearTrain",
    "Moments",
    "Pivoted",
    "SpatialSVD",
    "Spectrum",
    "TensorTrain",
    "Tucker",
    "Tucker2",
    "WhitenedSVD",
    "damped_gradients",
    "factorise",
    "judged_energy",
    "output_errors",
    "output_root",
]

load_registering(__name__, __path__)

"""Methods that factorise a canonical weight. They know nothing of layers."""

import importlib
import pkgutil

from rankfold.decompositions._base import Decomposition, Family, Moments, Spectrum
from rankfold.decompositions._interpolative import Interpolative
from rankfold.decompositions._spatial_svd import SpatialSVD
from rankfold.decompositions._svd import SVD
from rankfold.decompositions._tucker2 import Tucker2
from rankfold.decompositions._whitened_svd import WhitenedSVD
from rankfold.decompositions.weighting import factorise, output_errors, output_root

__all__ = [
    "SVD",
    "Decomposition",
    "Family",
    "Interpolative",
    "Moments",
    "SpatialSVD",
    "Spectrum",
    "Tucker2",
    "WhitenedSVD",
    "factorise",
    "output_errors",
    "output_root",
]

for _method in pkgutil.iter_modules(__path__):  # every file named _METHOD.py registers one
    if _method.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_method.name}")

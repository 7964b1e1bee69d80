"""Training for compressibility: penalties for any training loop, and models in the form that training needs."""

from rankfold.training._base import Regularizer
from rankfold.training.extraction import extract
from rankfold.training.forms import Ordered, Overparameterized
from rankfold.training.optimizers import check_optimizer
from rankfold.training.ordered import (
    HierarchicalLasso,
    OrderedSampler,
    drop_ranks,
    merge_ordered,
    to_ordered,
)
from rankfold.training.orthogonality import Orthogonality
from rankfold.training.overparameterized import merge, overparameterize
from rankfold.training.recovery import Recovered, recover
from rankfold.training.search import Searched, search
from rankfold.training.smoothness import FirstDerivative, NuclearNorm, SecondDerivative

__all__ = [
    "FirstDerivative",
    "HierarchicalLasso",
    "NuclearNorm",
    "Ordered",
    "OrderedSampler",
    "Orthogonality",
    "Overparameterized",
    "Recovered",
    "Regularizer",
    "Searched",
    "SecondDerivative",
    "check_optimizer",
    "drop_ranks",
    "extract",
    "merge",
    "merge_ordered",
    "overparameterize",
    "recover",
    "search",
    "to_ordered",
]

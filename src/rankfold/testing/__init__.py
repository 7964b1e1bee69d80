"""The contract of every axis as cases that your own method inherits; toy models and hard matrices.

Needs pytest (`pip install rankfold[testing]`). In your own tests:

    import rankfold.testing

    class TestMyMethod(rankfold.testing.DecompositionConformance):
        method = MyMethod()
"""

import pytest

for _module in ("decompositions", "selectors", "shells", "statistics"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from rankfold.testing.conformance import DecompositionConformance  # noqa: E402 - asserts are rewritten before import
from rankfold.testing.devices import devices  # noqa: E402
from rankfold.testing.layers import LAYERS, toy_layer  # noqa: E402
from rankfold.testing.matrices import (  # noqa: E402
    HARD_WEIGHTS,
    MOMENTS,
    SHAPES,
    hard_weight,
    moments_of_weight,
    toy_weight,
)
from rankfold.testing.networks import random_network, toy_network  # noqa: E402
from rankfold.testing.problems import random_problem  # noqa: E402
from rankfold.testing.selectors import SelectorConformance  # noqa: E402
from rankfold.testing.statistics import StatisticConformance  # noqa: E402

__all__ = [
    "HARD_WEIGHTS",
    "LAYERS",
    "MOMENTS",
    "SHAPES",
    "DecompositionConformance",
    "SelectorConformance",
    "StatisticConformance",
    "devices",
    "hard_weight",
    "moments_of_weight",
    "random_network",
    "random_problem",
    "toy_layer",
    "toy_network",
    "toy_weight",
]

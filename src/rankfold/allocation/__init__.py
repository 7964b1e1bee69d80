"""Choice of ranks: from curves and a budget to one option per site."""

from rankfold.allocation._base import RankSelector, Selector
from rankfold.allocation._bayesian import Bayesian
from rankfold.allocation._energy import Energy
from rankfold.allocation._error_bound import ErrorBound
from rankfold.allocation._evbmf import EVBMF
from rankfold.allocation._fixed import Fixed
from rankfold.allocation._half_way import HalfWay
from rankfold.allocation._knapsack import Knapsack
from rankfold.allocation._lagrangian import Lagrangian
from rankfold.allocation._rounded import Rounded
from rankfold.allocation._uniform import Uniform
from rankfold.allocation._zero_sum import ZeroSum
from rankfold.allocation.curve import Curves, Option, Problem, RankCurve
from rankfold.cost.resources import Budget
from rankfold.loading import load_registering

__all__ = [
    "EVBMF",
    "Bayesian",
    "Budget",
    "Curves",
    "Energy",
    "ErrorBound",
    "Fixed",
    "HalfWay",
    "Knapsack",
    "Lagrangian",
    "Option",
    "Problem",
    "RankCurve",
    "RankSelector",
    "Rounded",
    "Selector",
    "Uniform",
    "ZeroSum",
]

load_registering(__name__, __path__)

"""From curves and a budget to one decision a site."""

from rankfold.allocation._base import RankSelector, Selector
from rankfold.allocation._energy import Energy
from rankfold.allocation._half_way import HalfWay
from rankfold.allocation._lagrangian import Lagrangian
from rankfold.allocation._rounded import Rounded
from rankfold.allocation._uniform import Uniform
from rankfold.allocation.budget import Budget
from rankfold.allocation.curve import Curves, Option, Problem, RankCurve

__all__ = [
    "Budget",
    "Curves",
    "Energy",
    "HalfWay",
    "Lagrangian",
    "Option",
    "Problem",
    "RankCurve",
    "RankSelector",
    "Rounded",
    "Selector",
    "Uniform",
]

"""From curves and a budget to one decision a site."""

from rankfold.ranks._base import RankSelector, Selector
from rankfold.ranks._energy import Energy
from rankfold.ranks._half_way import HalfWay
from rankfold.ranks._lagrangian import Lagrangian
from rankfold.ranks._rounded import Rounded
from rankfold.ranks._uniform import Uniform
from rankfold.ranks.budget import Budget
from rankfold.ranks.curve import Curves, Option, Problem, RankCurve

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

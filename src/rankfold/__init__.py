"""rankfold: make a trained PyTorch network smaller and faster under one budget, without retraining it.

Names are loaded when they are first used, so that `import rankfold` and `rankfold --help` stay quick and change no
global state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rankfold._version import __version__

if TYPE_CHECKING:
    from rankfold.applying import apply, apply_
    from rankfold.channels.widths import InterpolativeGreedy, RemovalGreedy, SameShare, WidthSelector
    from rankfold.checkpoint import load, save
    from rankfold.curves import measure, needed
    from rankfold.decompositions import (
        SVD,
        Decomposition,
        Family,
        Interpolative,
        Moments,
        SpatialSVD,
        Tucker2,
        WhitenedSVD,
    )
    from rankfold.errors import RankfoldError
    from rankfold.factors import Factors, MatrixFactors, MirroredFactors, SpatialFactors, TuckerFactors
    from rankfold.forecast import Forecast
    from rankfold.graph.channels import ChannelGroup, Channels, find_channels
    from rankfold.graph.sites import Site, Sites, Skip, find_sites
    from rankfold.hugging_face import save_pretrained
    from rankfold.layers.attention import split_attention
    from rankfold.metrics.compare import Comparison, compare
    from rankfold.metrics.corruptions import Blur, Brightness, Corruption, Noise
    from rankfold.metrics.decisions import Decisions, decisions
    from rankfold.metrics.outputs import Embedding, Logits, Output, Values
    from rankfold.pipeline import Compressed, compress, execute, prepare
    from rankfold.plan import ChannelDecision, Decision, Plan
    from rankfold.planning import make_plan, plan_cost
    from rankfold.progress import progress_bar
    from rankfold.ranks import Budget, Energy, HalfWay, Lagrangian, RankCurve, RankSelector, Rounded, Uniform
    from rankfold.registry import register
    from rankfold.repair import Lockstep
    from rankfold.repair.batch_norm import reestimate_batch_norms
    from rankfold.report import Report
    from rankfold.session import Session
    from rankfold.statistics import Statistic, Statistics
    from rankfold.statistics.collect import collect
    from rankfold.statistics.gradients import collect_gradients
    from rankfold.surgery import merge

_HOME = {
    "rankfold.applying": ("apply", "apply_"),
    "rankfold.channels.widths": ("InterpolativeGreedy", "RemovalGreedy", "SameShare", "WidthSelector"),
    "rankfold.checkpoint": ("load", "save"),
    "rankfold.curves": ("measure", "needed"),
    "rankfold.decompositions": (
        "SVD",
        "Decomposition",
        "Family",
        "Interpolative",
        "Moments",
        "SpatialSVD",
        "Tucker2",
        "WhitenedSVD",
    ),
    "rankfold.errors": ("RankfoldError",),
    "rankfold.factors": ("Factors", "MatrixFactors", "MirroredFactors", "SpatialFactors", "TuckerFactors"),
    "rankfold.forecast": ("Forecast",),
    "rankfold.graph.channels": ("ChannelGroup", "Channels", "find_channels"),
    "rankfold.graph.sites": ("Site", "Sites", "Skip", "find_sites"),
    "rankfold.hugging_face": ("save_pretrained",),
    "rankfold.layers.attention": ("split_attention",),
    "rankfold.metrics.compare": ("Comparison", "compare"),
    "rankfold.metrics.corruptions": ("Blur", "Brightness", "Corruption", "Noise"),
    "rankfold.metrics.decisions": ("Decisions", "decisions"),
    "rankfold.metrics.outputs": ("Embedding", "Logits", "Output", "Values"),
    "rankfold.pipeline": ("Compressed", "compress", "execute", "prepare"),
    "rankfold.plan": ("ChannelDecision", "Decision", "Plan"),
    "rankfold.planning": ("make_plan", "plan_cost"),
    "rankfold.ranks": ("Budget", "Energy", "HalfWay", "Lagrangian", "RankCurve", "RankSelector", "Rounded", "Uniform"),
    "rankfold.registry": ("register",),
    "rankfold.progress": ("progress_bar",),
    "rankfold.repair": ("Lockstep",),
    "rankfold.repair.batch_norm": ("reestimate_batch_norms",),
    "rankfold.report": ("Report",),
    "rankfold.session": ("Session",),
    "rankfold.statistics": ("Statistic", "Statistics"),
    "rankfold.statistics.collect": ("collect",),
    "rankfold.statistics.gradients": ("collect_gradients",),
    "rankfold.surgery": ("merge",),
}
_WHERE = {name: module for module, exported in _HOME.items() for name in exported}

__all__ = [
    "SVD",
    "Blur",
    "Brightness",
    "Budget",
    "ChannelDecision",
    "ChannelGroup",
    "Channels",
    "Comparison",
    "Compressed",
    "Corruption",
    "Decision",
    "Decisions",
    "Decomposition",
    "Embedding",
    "Energy",
    "Factors",
    "Family",
    "Forecast",
    "HalfWay",
    "Interpolative",
    "InterpolativeGreedy",
    "Lagrangian",
    "Lockstep",
    "Logits",
    "MatrixFactors",
    "MirroredFactors",
    "Moments",
    "Noise",
    "Output",
    "Plan",
    "RankCurve",
    "RankSelector",
    "RankfoldError",
    "RemovalGreedy",
    "Report",
    "Rounded",
    "SameShare",
    "Session",
    "Site",
    "Sites",
    "Skip",
    "SpatialFactors",
    "SpatialSVD",
    "Statistic",
    "Statistics",
    "Tucker2",
    "TuckerFactors",
    "Uniform",
    "Values",
    "WhitenedSVD",
    "WidthSelector",
    "__version__",
    "apply",
    "apply_",
    "collect",
    "collect_gradients",
    "compare",
    "compress",
    "decisions",
    "execute",
    "find_channels",
    "find_sites",
    "load",
    "make_plan",
    "measure",
    "merge",
    "needed",
    "plan_cost",
    "prepare",
    "progress_bar",
    "reestimate_batch_norms",
    "register",
    "save",
    "save_pretrained",
    "split_attention",
]


def __getattr__(name: str) -> object:
    """Load a public name, or a subpackage, when it is first asked for."""
    if name in _WHERE:
        value: object = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in {"cli", "errors", "linalg", "testing"}:
        return importlib.import_module(f"rankfold.{name}")
    raise AttributeError(f"module 'rankfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names."""
    return sorted(__all__)

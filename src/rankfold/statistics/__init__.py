"""Streaming, mergeable summaries of a site's inputs, outputs and gradients."""

from rankfold.statistics._base import Statistic
from rankfold.statistics._coherence import Coherence
from rankfold.statistics._gradients import GradientGram
from rankfold.statistics._loss_gradient import LossGradient
from rankfold.statistics._moments import InputGram, InputGroups, InputMean, OutputGram
from rankfold.statistics.store import Statistics

__all__ = [
    "Coherence",
    "GradientGram",
    "InputGram",
    "InputGroups",
    "InputMean",
    "LossGradient",
    "OutputGram",
    "Statistic",
    "Statistics",
]

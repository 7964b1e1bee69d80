"""Every statistic of ours keeps the laws that rankfold.testing ships."""

from __future__ import annotations

from rankfold.statistics import GradientGram, InputGram, InputMean, OutputGram
from rankfold.testing import StatisticConformance


class TestInputGram(StatisticConformance):
    statistic = InputGram


class TestInputMean(StatisticConformance):
    statistic = InputMean


class TestOutputGram(StatisticConformance):
    statistic = OutputGram


class TestGradientGram(StatisticConformance):
    statistic = GradientGram

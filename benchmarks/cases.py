"""The benchmark cases: a name, a network, a budget and the options of the compression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import rankfold as rf


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        network: Key of `benchmarks.networks.NETWORKS`.
        budget: What is asked for.
        options: Further arguments of `rankfold.compress`.
        samples: Calibration inputs.
        label: For the table.
        without: Class of which no calibration input is; None is all.
    """

    network: str
    budget: rf.Budget
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 1024
    without: int | None = None


def _plain(network: str) -> list[Case]:
    """Without repair, at half the parameters: what the first release is measured by."""
    half = rf.Budget(params=0.5)
    plain: dict[str, Any] = {"repair": None, "weighting": False}
    white = [rf.WhitenedSVD()]
    return [
        Case(network, half, "SVD, uniform", {"families": [rf.SVD()], "selector": rf.Uniform(), **plain}),
        Case(network, half, "WhitenedSVD, uniform", {"families": white, "selector": rf.Uniform(), **plain}),
        Case(network, half, "WhitenedSVD, global", {"families": white, "selector": rf.Lagrangian(), **plain}),
        Case(network, half, "WhitenedSVD, weighted global", {"families": white, "repair": None}),
        Case(network, half, "all families, weighted global", {"repair": None}),
    ]


def _lockstep() -> list[Case]:
    """Default options: what the lockstep repair is measured by."""
    return [
        Case("resnet56", rf.Budget(params=0.7), "default"),
        Case("resnet56", rf.Budget(params=0.5), "default"),
        Case("resnet56", rf.Budget(params=0.3), "default"),
        Case("resnet56", rf.Budget(macs=0.5), "default"),
        Case("resnet20", rf.Budget(params=0.5), "default"),
        Case("resnet20", rf.Budget(params=0.7), "default"),
        Case("mobilenet_v1", rf.Budget(params=0.7), "default", samples=250),
        Case(
            "mobilenet_v1",
            rf.Budget(params=0.7),
            "WhitenedSVD, no repair, no weighting",
            {"families": [rf.WhitenedSVD()], "repair": None, "weighting": False},
            samples=250,
        ),
    ]


def _parts() -> list[Case]:
    """What each part of the road is worth, on ResNet-56 at half the parameters."""
    half = rf.Budget(params=0.5)
    return [
        Case("resnet56", half, "default"),
        Case("resnet56", half, "no repair", {"repair": None}),
        Case("resnet56", half, "no weighting", {"weighting": False}),
        Case("resnet56", half, "neither", {"repair": None, "weighting": False}),
        Case("resnet56", half, "skip error not absorbed", {"repair": rf.Lockstep(absorb_skip=False)}),
        Case("resnet56", half, "WhitenedSVD alone", {"families": [rf.WhitenedSVD()]}),
        Case("resnet56", half, "SpatialSVD alone", {"families": [rf.SpatialSVD()]}),
        Case("resnet56", half, "Tucker2 alone", {"families": [rf.Tucker2()]}),
        Case("resnet56", half, "uniform", {"selector": rf.Uniform()}),
    ]


def _channels() -> list[Case]:
    """Channels alone, default options, and the families together: what the removal of channels is measured by."""
    alone: dict[str, Any] = {"families": [rf.Interpolative()]}
    return [
        Case("resnet56", rf.Budget(params=0.7), "channels", alone),
        Case("resnet56", rf.Budget(params=0.5), "channels", alone),
        Case("resnet56", rf.Budget(params=0.3), "channels", alone),
        Case("resnet20", rf.Budget(params=0.7), "channels", alone),
        Case("resnet56", rf.Budget(macs=0.7), "channels", alone),
        Case("resnet56", rf.Budget(macs=0.5), "channels", alone),
        Case("mobilenet_v1", rf.Budget(macs=0.7), "channels", alone, samples=250),
        Case("mobilenet_v1", rf.Budget(macs=0.5), "channels", alone, samples=250),
    ]


def _rules() -> list[Case]:
    """The same sizes for every rule: which channels stay, whether their readers are corrected, and how."""
    cases = []
    for network, samples in (("resnet56", 1024), ("mobilenet_v1", 250)):
        for kept in (0.7, 0.5):
            for label, rule, fold, repair in (
                ("magnitude, only cut", "magnitude", False, None),
                ("magnitude, fold", "magnitude", True, None),
                ("pivoted QR, fold", "pivoted-qr", True, None),
                ("backward, fold", "backward", True, None),
                ("magnitude, lockstep", "magnitude", True, rf.Lockstep()),
                ("backward, lockstep", "backward", True, rf.Lockstep()),
            ):
                options: dict[str, Any] = {
                    "families": [rf.Interpolative(rule=rule, fold=fold)],
                    "selector": rf.SameShare(),
                    "repair": repair,
                }
                cases.append(Case(network, rf.Budget(macs=kept), f"{label}, macs {kept}", options, samples))
    return cases


def _seed_curve() -> list[Case]:
    """The seed's curve: its own rule and fold, its sizes with our choice in lockstep, and the default options."""
    cases = []
    seed: dict[str, Any] = {"selector": rf.InterpolativeGreedy(), "repair": None}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("the seed's rule", {"families": [rf.Interpolative(rule="pivoted-qr")], **seed}),
        ("the seed's sizes, ours", {"families": [rf.Interpolative()], "selector": rf.InterpolativeGreedy()}),
        ("channels", {"families": [rf.Interpolative()]}),
    ]
    for kept in (0.71, 0.52, 0.39, 0.27):
        for label, options in ways:
            for without in (None, 0):
                text = label if without is None else f"{label}, a class missing"
                cases.append(Case("vgg16", rf.Budget(macs=kept), text, options, samples=1000, without=without))
    return cases


def _mixed() -> list[Case]:
    """All families under one budget against each of them alone that can meet it; MobileNetV1 is 1x1 and depthwise."""
    alone: list[tuple[str, dict[str, Any]]] = [
        ("default", {}),
        ("WhitenedSVD alone", {"families": [rf.WhitenedSVD()]}),
        ("SpatialSVD alone", {"families": [rf.SpatialSVD()]}),
        ("Tucker2 alone", {"families": [rf.Tucker2()]}),
        ("channels alone", {"families": [rf.Interpolative()]}),
    ]
    return [
        Case(network, budget, f"{label}, {name} 0.5", options, samples)
        for network, samples in (("resnet20", 1024), ("resnet56", 1024), ("mobilenet_v1", 250))
        for name, budget in (("params", rf.Budget(params=0.5)), ("macs", rf.Budget(macs=0.5)))
        for label, options in alone
        if network != "mobilenet_v1" or label not in ("SpatialSVD alone", "Tucker2 alone")
    ]


CASES: dict[str, list[Case]] = {
    "lockstep": _lockstep(),
    "channels": _channels(),
    "rules": _rules(),
    "mixed": _mixed(),
    "seed-curve": _seed_curve(),
    "parts": _parts(),
    "no-repair-resnet56": _plain("resnet56"),
    "no-repair-resnet20": _plain("resnet20"),
}

"""JSON → plan: text that a person may have edited, checked key by key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from rankfold.allocation import Selector
from rankfold.channels.widths import WidthSelector
from rankfold.cost.resources import RESOURCES, Budget
from rankfold.data.draws import SEED_LAW, is_seed
from rankfold.decompositions import Decomposition, Interpolative
from rankfold.errors import BudgetError, PlanError, near_matches, shown
from rankfold.layers.stands import BYPASS, CONSTANT, Stand
from rankfold.plan.decisions import BranchDecision, ChannelDecision, Decision
from rankfold.plan.indices import from_ranges
from rankfold.registry import from_json
from rankfold.serialization import converted
from rankfold.sites.site import Skip

VERSION = 1
MOST = 2**31  # channels of a constant
AS_THEY_ARE = (
    "fingerprint",
    "model",
    "budget",
    "selector",
    "seed",
    "calibration",
    "repair",
    "removal",
    "width_selector",
)
OF_GROUP = "as "  # prefix of the name of a group whose kept units a cut keeps


class _Decision(msgspec.Struct, forbid_unknown_fields=True):
    site: str
    method: Any
    rank: Any
    why: str = ""
    error: float | None = None


class _Channels(msgspec.Struct, forbid_unknown_fields=True):
    group: str
    units: int
    kept: Any
    why: str = ""
    fold: bool = True


class _Branch(msgspec.Struct, forbid_unknown_fields=True):
    branch: str
    constant: str = ""
    why: str = ""


class _Stand(msgspec.Struct, forbid_unknown_fields=True):
    kind: str
    items: list[bool] = []
    channels: int = 0
    axes: int = 0
    full: bool = False
    copied: bool = False


class _Skip(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    reason: str


class _Plan(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    decisions: list[_Decision]
    fingerprint: str
    skips: list[_Skip] = []
    model: str = ""
    budget: dict[str, Any] = {}
    seed: int = 0
    calibration: dict[str, Any] = {}
    selector: dict[str, Any] | None = None
    repair: dict[str, Any] | None = None
    channels: list[_Channels] = []
    cuts: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    removal: dict[str, Any] | None = None
    width_selector: dict[str, Any] | None = None
    branches: list[_Branch] = []
    stands: dict[str, _Stand] = {}
    split: list[str] = []


def read_plan(value: Any, place: str) -> dict[str, Any]:
    """The fields of a `Plan` from JSON values.

    Args:
        value: JSON values from `parse_json`.
        place: Name of the plan, for the message.

    Raises:
        PlanError: A key is missing, unknown or of another type, or has a value that no plan can have.
    """
    if isinstance(value, dict) and (type(value.get("version")) is not int or value["version"] != VERSION):
        raise PlanError(
            place,
            law=f"a plan of version {VERSION}",
            got=f"version {shown(value.get('version'))}",
            cure="write it again with this release, or read it with the release that wrote it",
        )
    read = converted(value, _Plan, place=place, error=PlanError, cure="correct it, or see docs/file-format.md")
    channels = tuple(_channels(each, f"{place}.channels[{i}]") for i, each in enumerate(read.channels))
    kept = {f"{OF_GROUP}{each.group}": each.kept for each in channels}
    budget_of(read.budget, place)
    for key, kind in (("selector", Selector), ("width_selector", WidthSelector), ("removal", Interpolative)):
        if (method := getattr(read, key)) is not None:
            from_json(method, kind, place=f"{place}.{key}")
    if not is_seed(read.seed):
        raise PlanError(f"{place}.seed", law=SEED_LAW, got=shown(read.seed), cure="correct it")
    _check_samples(read.calibration, place)
    return {
        "decisions": _decisions(read.decisions, place),
        "skips": tuple(Skip(each.path, each.reason) for each in read.skips),
        "channels": channels,
        "cuts": {name: _axes(axes, f"{place}.cuts.{name}", kept) for name, axes in read.cuts.items()},
        "attributes": {path: _numbers(own, f"{place}.attributes.{path}") for path, own in read.attributes.items()},
        "branches": tuple(BranchDecision(each.branch, each.constant, each.why) for each in read.branches),
        "stands": {path: _stand(each, f"{place}.stands.{path}") for path, each in read.stands.items()},
        "split": tuple(read.split),
        **{name: getattr(read, name) for name in AS_THEY_ARE},
    }


def _decisions(read: list[_Decision], place: str) -> tuple[Decision, ...]:
    """The decisions, one per site."""
    found: dict[str, Decision] = {}
    for number, each in enumerate(read):
        decision = _decision(each, f"{place}.decisions[{number}]")
        if decision.site in found:
            got = f"two for {shown(decision.site)}"
            raise PlanError(place, law="one decision a site", got=got, cure="remove one")
        found[decision.site] = decision
    return tuple(found.values())


def _decision(read: _Decision, place: str) -> Decision:
    """One decision."""
    if read.error is not None and read.error < 0:
        law = "a predicted error is a number of at least 0"
        raise PlanError(f"{place} ({read.site}).error", law=law, got=shown(read.error), cure="leave it out")
    method = None if read.method is None else from_json(read.method, Decomposition, place=f"{place}.method")
    rank = tuple(read.rank) if isinstance(read.rank, list) else read.rank
    parts = rank if isinstance(rank, tuple) else (rank,)
    whole = bool(parts) and all(type(part) is int and part > 0 for part in parts)
    if method is None and type(rank) is int and rank == 0:
        return Decision(read.site, None, 0, read.why, read.error)
    if (method is None) != (rank is None) or (rank is not None and not whole):
        raise PlanError(
            f"{place} ({read.site})",
            law="a method with a rank of at least 1, null with 0 (gone with its branch), or both null (dense)",
            got=shown(rank),
            cure="correct the rank, or set both to null",
        )
    return Decision(read.site, method, rank, read.why, read.error)


def _stand(read: _Stand, place: str) -> Stand:
    """What takes the place of one module."""
    constant = read.kind == CONSTANT and 0 < read.channels < MOST and 0 <= read.axes <= 3 and not read.copied
    if not constant and not (read.kind == BYPASS and read.channels == read.axes == 0 and not read.full):
        raise PlanError(
            place,
            law=f'a "{BYPASS}", or a "{CONSTANT}" of at least one channel',
            got=shown(msgspec.to_builtins(read)),
            cure="make the plan again",
        )
    return Stand(read.kind, tuple(read.items), read.channels, read.axes, read.full, read.copied)


def _channels(read: _Channels, place: str) -> ChannelDecision:
    """The decision about one group."""
    kept = _ascending(read.kept, f"{place} ({read.group})", read.units)
    return ChannelDecision(read.group, read.units, kept, read.why, read.fold)


def _check_samples(calibration: Mapping[str, Any], place: str) -> None:
    """Refuse a number of samples that gradients cannot be collected from."""
    samples = calibration.get("gradient_samples", 1)
    if type(samples) is not int or samples < 1:
        raise PlanError(
            f"{place}.calibration.gradient_samples",
            law="an int of at least 1",
            got=shown(samples),
            cure="correct it, or remove the key: then errors are not weighted",
        )


def _ascending(value: Any, place: str, size: int | None = None) -> tuple[int, ...]:
    """Ascending indices, at least one, all below a size: from text (`as_ranges`), or from a list in older plans."""
    if isinstance(value, str):
        value = list(from_ranges(value) or (value,))
    whole = isinstance(value, list) and bool(value) and all(type(index) is int and index >= 0 for index in value)
    if not whole or any(b <= a for a, b in itertools.pairwise(value)) or (size is not None and value[-1] >= size):
        law = "ascending indices of what stays, at least one, such as 0-4,7" + (
            "" if size is None else f", all below {size}"
        )
        raise PlanError(place, law=law, got=shown(value), cure="make the plan again rather than edit the cuts")
    return tuple(value)


def _axes(value: Any, place: str, of_groups: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """The cuts of one tensor; some are those of a group."""
    if not isinstance(value, dict) or not all(re.fullmatch(r"\d", axis) for axis in value):
        raise PlanError(place, law='an object with axes such as "0"', got=shown(value), cure="make the plan again")
    return {
        int(axis): of_groups[kept]
        if isinstance(kept, str) and kept in of_groups
        else _ascending(kept, f"{place}.{axis}")
        for axis, kept in value.items()
    }


def _numbers(value: Any, place: str) -> dict[str, int]:
    """Positive whole numbers by name."""
    if isinstance(value, dict) and all(type(number) is int and number > 0 for number in value.values()):
        return dict(value)
    raise PlanError(place, law="an object of whole numbers of at least 1", got=shown(value), cure="correct it")


def budget_of(bounds: Mapping[str, float | int], place: str) -> Budget | None:
    """The budget whose bounds a plan records; None where it records none.

    Args:
        bounds: Bounds by resource.
        place: Name of the plan, for the message.

    Raises:
        PlanError: A resource is unknown, or a bound is not valid.
    """
    if not bounds:
        return None
    for name in bounds:
        if name not in RESOURCES:
            cure = near_matches(name, RESOURCES)
            raise PlanError(f"{place}.budget", law="only known keys", got=shown(name), cure=cure)
    try:
        return Budget(**bounds)
    except BudgetError as cause:
        raise PlanError(f"{place}.budget", law=cause.law, got=cause.got, cure=cause.cure) from cause

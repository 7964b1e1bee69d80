"""The plan: one decision or skip for every layer, as versioned JSON that a person can edit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankfold.allocation import Budget, Selector
from rankfold.cost.resources import RESOURCES
from rankfold.data.draws import SEED_LAW, is_seed
from rankfold.decompositions import Decomposition, Interpolative
from rankfold.errors import BudgetError, PlanError, near_matches, shown
from rankfold.factors import Rank
from rankfold.plan.indices import as_ranges, from_ranges
from rankfold.registry import from_json, to_json
from rankfold.serialization import canonical_json, parse_json, read_json
from rankfold.sites.site import Skip

VERSION = 1
OF_GROUP = "as "  # before the name of a group whose kept units a cut keeps


@dataclass(frozen=True)
class Decision:
    """What becomes of a site.

    Attributes:
        site: Its path.
        method: The decomposition; None leaves the site dense.
        rank: The rank; None where dense.
        why: Why: the selector's reason, in words.
        error: The predicted error, as `measure` defines it; None where dense, and in plans written by hand.
    """

    site: str
    method: Decomposition | None = None
    rank: Rank | None = None
    why: str = ""
    error: float | None = None

    @property
    def form(self) -> str:
        """Form of the factors, or "dense"."""
        return "dense" if self.method is None else self.method.form

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        method = None if self.method is None else to_json(self.method)
        error = {} if self.error is None else {"error": self.error}
        return {"site": self.site, "method": method, "rank": rank, "why": self.why, **error}

    @classmethod
    def from_json(cls, value: Any, place: str) -> Decision:
        """Read what `to_json` wrote; raises `PlanError` naming the key."""
        keys = _object(value, place, required={"site", "method", "rank"}, optional={"why", "error"})
        site, rank, why, error = keys["site"], keys["rank"], keys.get("why", ""), keys.get("error")
        if not isinstance(site, str) or not isinstance(why, str):
            raise PlanError(place, law="site and why are strings", got=_pair(site, why), cure="correct them")
        if error is not None and (isinstance(error, bool) or not isinstance(error, (int, float)) or error < 0):
            law = "a predicted error is a number of at least 0"
            raise PlanError(f"{place} ({site}).error", law=law, got=shown(error), cure="leave it out")
        method = None if keys["method"] is None else from_json(keys["method"], Decomposition, place=f"{place}.method")
        rank = tuple(rank) if isinstance(rank, list) else rank
        parts = rank if isinstance(rank, tuple) else (rank,)
        whole = all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in parts)
        if (method is None) != (rank is None) or (rank is not None and not (parts and whole)):
            raise PlanError(
                f"{place} ({site})",
                law="a method with a rank of at least 1, or both null (dense)",
                got=shown(rank),
                cure="correct the rank, or set both to null",
            )
        return cls(site, method, rank, why, error)


@dataclass(frozen=True)
class ChannelDecision:
    """Which channels of a group stay.

    Attributes:
        group: Name of the group: the first layer that makes its channels.
        units: How many units the group has.
        kept: The units that stay, ascending.
        why: Why, in words.
        fold: Whether the layers that read the channels are corrected for what goes, where no repair does it.
    """

    group: str
    units: int
    kept: tuple[int, ...]
    why: str = ""
    fold: bool = True

    def to_json(self) -> dict[str, Any]:
        """As a dict."""
        kept = as_ranges(self.kept)
        return {"group": self.group, "units": self.units, "kept": kept, "why": self.why, "fold": self.fold}

    @classmethod
    def from_json(cls, value: Any, place: str) -> ChannelDecision:
        """Read what `to_json` wrote; raises `PlanError` naming the key."""
        keys = _object(value, place, required={"group", "units", "kept"}, optional={"why", "fold"})
        group, units, why, fold = keys["group"], keys["units"], keys.get("why", ""), keys.get("fold", True)
        if not isinstance(group, str) or not isinstance(why, str) or type(units) is not int or type(fold) is not bool:
            raise PlanError(
                place,
                law="group and why are strings, units an int, fold a bool",
                got=_pair(group, units),
                cure="correct them",
            )
        return cls(group, units, _ascending(keys["kept"], f"{place} ({group})", units), why, fold)


@dataclass(frozen=True)
class Plan:
    """Enough to rebuild the compressed structure from the original's.

    Attributes:
        decisions: One a site, in the order of the sites.
        skips: Layers left alone, with the reason.
        fingerprint: Of the original model's structure.
        model: Name of the original's class, for the reader.
        budget: The bounds that were asked for.
        selector: The selector of the ranks, as its JSON; None where none were chosen, or for a plan written by hand.
            (In an older plan that removes channels but has no `width_selector`, it may be that one.)
        seed: Seed of everything that was drawn.
        calibration: Manifest of the data.
        repair: The repair at apply time, as its JSON; None for none.
        channels: One a group of channels of which some are removed.
        cuts: What that leaves of every tensor: parameter or buffer → axis → indices that stay. Decisions are on the
            layers as the cuts leave them.
        attributes: New values of numbers that modules keep about their channels (heads): path → attribute → value.
        removal: The family that removed the channels, with its options, as its JSON; None where none were removed.
        width_selector: What chose how many channels stay, as its JSON; None likewise.
    """

    decisions: tuple[Decision, ...]
    skips: tuple[Skip, ...]
    fingerprint: str
    model: str = ""
    budget: Mapping[str, float | int] = field(default_factory=dict)
    selector: Mapping[str, Any] | None = None
    seed: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict)
    repair: Mapping[str, Any] | None = None
    channels: tuple[ChannelDecision, ...] = ()
    cuts: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    removal: Mapping[str, Any] | None = None
    width_selector: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Canonical JSON text: equal plans give equal bytes."""
        groups = {each.kept: f"{OF_GROUP}{each.group}" for each in reversed(self.channels)}
        removed: dict[str, Any] = {
            "channels": [decision.to_json() for decision in self.channels],
            "cuts": {
                name: {str(axis): groups.get(kept) or as_ranges(kept) for axis, kept in axes.items()}
                for name, axes in self.cuts.items()
            },
            "attributes": {path: dict(own) for path, own in self.attributes.items()},
        }
        chosen = {"removal": self.removal, "width_selector": self.width_selector}
        return canonical_json(
            {
                **(removed if self.channels or self.cuts else {}),
                **{key: value for key, value in chosen.items() if value is not None},
                "version": VERSION,
                "decisions": [decision.to_json() for decision in self.decisions],
                "skips": [{"path": skip.path, "reason": skip.reason} for skip in self.skips],
                "fingerprint": self.fingerprint,
                "model": self.model,
                "budget": dict(self.budget),
                "selector": self.selector,
                "repair": self.repair,
                "seed": self.seed,
                "calibration": dict(self.calibration),
            }
        )

    @classmethod
    def from_json(cls, text: str, *, place: str = "plan") -> Plan:
        """Read JSON text.

        Raises:
            PlanError: Malformed, of another version, or with a key that is not known; the place is named.
        """
        return cls._read(parse_json(text, place=place, error=PlanError), place)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file; see `from_json`."""
        return cls._read(read_json(Path(path), error=PlanError), str(path))

    @classmethod
    def _read(cls, value: Any, place: str) -> Plan:
        from rankfold.channels.widths import WidthSelector  # above this module; and its classes must be registered

        if isinstance(value, dict) and (type(value.get("version")) is not int or value["version"] != VERSION):
            raise PlanError(
                place,
                law=f"a plan of version {VERSION}",
                got=f"version {shown(value.get('version'))}",
                cure="write it again with this release, or read it with the release that wrote it",
            )
        optional = {"model", "budget", "selector", "seed", "calibration", "skips", "repair", "channels", "cuts"}
        optional |= {"attributes", "removal", "width_selector"}
        keys = _object(value, place, required={"version", "decisions", "fingerprint"}, optional=optional)
        kinds = {
            "decisions": list,
            "skips": list,
            "fingerprint": str,
            "model": str,
            "budget": dict,
            "seed": int,
            "calibration": dict,
            "selector": dict,
            "repair": dict,
            "channels": list,
            "cuts": dict,
            "attributes": dict,
            "removal": dict,
            "width_selector": dict,
        }
        for key, kind in kinds.items():
            if keys.get(key) is None and key in {"selector", "repair", "removal", "width_selector"}:
                continue
            if key in keys and (not isinstance(keys[key], kind) or isinstance(keys[key], bool)):
                raise PlanError(
                    f"{place}.{key}", law=f"a JSON {kind.__name__}", got=shown(keys[key]), cure="correct it"
                )
        decisions = tuple(
            Decision.from_json(item, f"{place}.decisions[{i}]") for i, item in enumerate(keys["decisions"])
        )
        skips = []
        for i, item in enumerate(keys.get("skips", [])):
            own = _object(item, f"{place}.skips[{i}]", required={"path", "reason"})
            if not isinstance(own["path"], str) or not isinstance(own["reason"], str):
                got = _pair(own["path"], own["reason"])
                raise PlanError(f"{place}.skips[{i}]", law="path and reason are strings", got=got, cure="correct them")
            skips.append(Skip(own["path"], own["reason"]))
        seen: set[str] = set()
        for decision in decisions:
            if decision.site in seen:
                raise PlanError(
                    place, law="one decision a site", got=f"two for {shown(decision.site)}", cure="remove one"
                )
            seen.add(decision.site)
        channels = tuple(
            ChannelDecision.from_json(item, f"{place}.channels[{i}]") for i, item in enumerate(keys.get("channels", []))
        )
        kept = {f"{OF_GROUP}{decision.group}": decision.kept for decision in channels}
        budget_of(keys.get("budget", {}), place)
        if keys.get("selector") is not None:
            from_json(keys["selector"], Selector, place=f"{place}.selector")
        if keys.get("width_selector") is not None:
            from_json(keys["width_selector"], WidthSelector, place=f"{place}.width_selector")
        if keys.get("removal") is not None:
            from_json(keys["removal"], Interpolative, place=f"{place}.removal")
        if not is_seed(keys.get("seed", 0)):
            raise PlanError(f"{place}.seed", law=SEED_LAW, got=shown(keys["seed"]), cure="correct it")
        samples = keys.get("calibration", {}).get("gradient_samples", 1)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise PlanError(
                f"{place}.calibration.gradient_samples",
                law="an int of at least 1",
                got=shown(samples),
                cure="correct it, or remove the key: then errors are not weighted",
            )
        return cls(
            decisions,
            tuple(skips),
            keys["fingerprint"],
            keys.get("model", ""),
            keys.get("budget", {}),
            keys.get("selector"),
            keys.get("seed", 0),
            keys.get("calibration", {}),
            keys.get("repair"),
            channels,
            {name: _axes(value, f"{place}.cuts.{name}", kept) for name, value in keys.get("cuts", {}).items()},
            {path: _numbers(value, f"{place}.attributes.{path}") for path, value in keys.get("attributes", {}).items()},
            keys.get("removal"),
            keys.get("width_selector"),
        )

    def at(self, site: str) -> Decision:
        """The decision of a site.

        Raises:
            PlanError: There is none; near matches are named.
        """
        for decision in self.decisions:
            if decision.site == site:
                return decision
        raise PlanError(
            repr(site),
            law="the plan decides on the site",
            got="no decision",
            cure=near_matches(site, [decision.site for decision in self.decisions]),
        )

    def with_decision(self, decision: Decision) -> Plan:
        """This plan with one decision replaced."""
        self.at(decision.site)
        changed = tuple(decision if old.site == decision.site else old for old in self.decisions)
        return replace(self, decisions=changed)

    @property
    def changes(self) -> tuple[Decision, ...]:
        """The decisions that are not dense."""
        return tuple(decision for decision in self.decisions if decision.method is not None)


def _ascending(value: Any, place: str, size: int | None = None) -> tuple[int, ...]:
    """Ascending indices, at least one, all below a size: as text (`as_ranges`), or as a list in older plans."""
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
    """A JSON object of positive whole numbers."""
    if isinstance(value, dict) and all(type(number) is int and number > 0 for number in value.values()):
        return dict(value)
    raise PlanError(place, law="an object of whole numbers of at least 1", got=shown(value), cure="correct it")


def _pair(first: object, second: object) -> str:
    return f"{shown(first, limit=40)}, {shown(second, limit=40)}"


def budget_of(bounds: Mapping[str, float | int], place: str) -> Budget | None:
    """The budget whose bounds a plan notes; None where it notes none.

    Args:
        bounds: By resource.
        place: Of the plan, named in the message.

    Raises:
        PlanError: An unknown resource, or a bound that is none.
    """
    if not bounds:
        return None
    known = _object(
        dict(bounds) if isinstance(bounds, Mapping) else bounds,
        f"{place}.budget",
        required=set(),
        optional=set(RESOURCES),
    )
    try:
        return Budget(**known)
    except BudgetError as cause:
        raise PlanError(f"{place}.budget", law=cause.law, got=cause.got, cure=cause.cure) from cause


def _object(
    value: Any,
    place: str,
    *,
    required: set[str],
    optional: frozenset[str] | set[str] = frozenset(),
) -> dict[str, Any]:
    """A JSON object with all required keys and no unknown one."""
    if not isinstance(value, dict):
        raise PlanError(place, law="a JSON object", got=shown(value), cure="see docs/file-format.md")
    for key in value:
        if key not in required | optional:
            raise PlanError(
                place, law="only known keys", got=shown(key), cure=near_matches(str(key), required | optional)
            )
    for key in sorted(required):
        if key not in value:
            raise PlanError(place, law=f"the key {key!r}", got=f"keys {shown(sorted(value))}", cure="add it")
    return value

"""The plan: one decision or skip for every layer, as versioned JSON that a person can edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankfold.errors import PlanError, near_matches
from rankfold.layers.stands import Stand
from rankfold.plan.decisions import BranchDecision, ChannelDecision, Decision
from rankfold.plan.indices import as_ranges
from rankfold.plan.reading import OF_GROUP, VERSION, read_plan
from rankfold.serialization import canonical_json, parse_json, read_json
from rankfold.sites.site import Skip


@dataclass(frozen=True)
class Plan:
    """All decisions of a compression: enough to rebuild the compressed structure from the original's.

    Attributes:
        decisions: Decisions, one per site, in the order of the sites.
        skips: Layers left alone, with the reason.
        fingerprint: Fingerprint of the original model's structure.
        model: Name of the original's class, for the reader.
        budget: The bounds that the caller gave.
        selector: The selector of the ranks, as its JSON; None where none were chosen, or for a plan written by hand.
            (In an older plan that removes channels but has no `width_selector`, it may be the selector of widths.)
        seed: Seed of everything that was drawn.
        calibration: Manifest of the data.
        repair: The repair at apply time, as its JSON; None for none.
        channels: Decisions, one per group of channels of which some are removed.
        cuts: Indices that stay of every tensor that is cut: parameter or buffer → axis → indices. Decisions are on
            the layers as the cuts leave them.
        attributes: New values of numbers that modules keep about their channels (heads): path → attribute → value.
        removal: The family that removed the channels, with its options, as its JSON; None where none were removed.
        width_selector: The selector of how many channels stay, as its JSON; None where none were removed.
        branches: Decisions, one per residual branch that goes.
        stands: What takes the place of the modules that go with them, by path.
        split: Paths of `nn.MultiheadAttention` in the original that are split into linear layers first. The fingerprint
            and all else are of the model as that leaves it.
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
    branches: tuple[BranchDecision, ...] = ()
    stands: Mapping[str, Stand] = field(default_factory=dict)
    split: tuple[str, ...] = ()

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
        gone = {
            "branches": [decision.to_json() for decision in self.branches],
            "stands": {path: stand.to_json() for path, stand in self.stands.items()},
        }
        chosen = {"removal": self.removal, "width_selector": self.width_selector}
        return canonical_json(
            {
                **(removed if self.channels or self.cuts else {}),
                **(gone if self.branches or self.stands else {}),
                **{key: value for key, value in chosen.items() if value is not None},
                **({"split": list(self.split)} if self.split else {}),
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
            PlanError: It is malformed, of another version, or has a key that is not known; the place is named.
        """
        return cls(**read_plan(parse_json(text, place=place, error=PlanError), place))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file; see `from_json`."""
        return cls(**read_plan(read_json(Path(path), error=PlanError), str(path)))

    def at(self, site: str) -> Decision:
        """The decision of a site.

        Raises:
            PlanError: There is no decision; near matches are named.
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

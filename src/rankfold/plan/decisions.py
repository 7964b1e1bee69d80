"""Decisions about a site, about a group of channels, and about a residual branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankfold.decompositions import Decomposition
from rankfold.factors import Rank
from rankfold.plan.indices import as_ranges
from rankfold.registry import to_json


@dataclass(frozen=True)
class Decision:
    """Decision about a site: dense, a method at a rank, or gone with its branch (no method, rank 0).

    Attributes:
        site: Path of the site.
        method: The decomposition; None leaves the site dense, or is for one that goes.
        rank: The rank; None where dense, 0 where the site goes with its branch.
        why: Reason of the selector, in words.
        error: The predicted error, as `measure` defines it; None where dense, and in plans written by hand.
    """

    site: str
    method: Decomposition | None = None
    rank: Rank | None = None
    why: str = ""
    error: float | None = None

    @property
    def gone(self) -> bool:
        """Whether the site goes with its branch."""
        return self.method is None and self.rank == 0

    @property
    def form(self) -> str:
        """Form of the factors, "dense", or "gone"."""
        if self.method is None:
            return "gone" if self.gone else "dense"
        return self.method.form

    def to_json(self) -> dict[str, Any]:
        """The decision as a dict."""
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        method = None if self.method is None else to_json(self.method)
        error = {} if self.error is None else {"error": self.error}
        return {"site": self.site, "method": method, "rank": rank, "why": self.why, **error}


@dataclass(frozen=True)
class ChannelDecision:
    """Decision about a group of channels: those that stay.

    Attributes:
        group: Name of the group: the first layer that makes its channels.
        units: Number of units of the group.
        kept: Indices of the units that stay, ascending.
        why: Reason, in words.
        fold: True if the layers that read the channels are corrected for those removed, where no repair does it.
    """

    group: str
    units: int
    kept: tuple[int, ...]
    why: str = ""
    fold: bool = True

    def to_json(self) -> dict[str, Any]:
        """The decision as a dict."""
        kept = as_ranges(self.kept)
        return {"group": self.group, "units": self.units, "kept": kept, "why": self.why, "fold": self.fold}


@dataclass(frozen=True)
class BranchDecision:
    """Decision about a residual branch: it goes.

    Attributes:
        branch: Name of the branch: the last layer in it.
        constant: Path of the module that becomes a constant, which is what is left of the branch; "" where a whole
            block goes and nothing is left.
        why: Reason, in words.
    """

    branch: str
    constant: str = ""
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """The decision as a dict."""
        return {"branch": self.branch, "constant": self.constant, "why": self.why}

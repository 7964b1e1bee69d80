"""The share of a model that can be cut at all, and the layers that stand in the way."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rankfold.cost.formula import dense_cost
from rankfold.cost.resources import RESOURCES, Cost, Holding
from rankfold.errors import BudgetError
from rankfold.sites.site import Sites

NO_MATRIX = "no matrix: its tensors have fewer than two axes, or are no weights"
NO_WEIGHT = "no weight: it multiplies activations with each other, or weights of other modules"
NOTHING_SMALLER = "no smaller form: none of the families given makes it smaller"
NO_CHANNELS = "frozen: no channels of it can be removed, and no other family was given"


@dataclass(frozen=True)
class Blocker:
    """A module that no compression makes smaller.

    Attributes:
        path: Dotted path; "" is the model's own code.
        kind: Name of its class.
        amount: Amount of the resource that the module has itself, its children left out.
        share: Share of the whole original model, 0 to 1.
        reason: Reason why it stays, as *kind: explanation*.
    """

    path: str
    kind: str
    amount: int
    share: float
    reason: str

    def __str__(self) -> str:
        """Path, class, share and reason, for a message."""
        return f"{self.path or '(the model)'} ({self.kind}, {self.share:.4f}, {self.reason})"


def cuttable(sites: Sites) -> Cost:
    """Cost of the sites as they are: all that ranks and channels can be cut from, norms between them left out."""
    return sum((dense_cost(site) for site in sites), Cost())


def reach(sites: Sites) -> dict[str, float]:
    """Share of the whole original model that can be cut, 0 to 1, by resource."""
    part, whole = cuttable(sites).amounts(), sites.whole.amounts()
    return {name: part[name] / max(whole[name], 1) for name in RESOURCES}


def blockers(
    sites: Sites,
    resource: str,
    *,
    most: int | None = 5,
    frozen: Mapping[str, str] | None = None,
    reduced: Collection[str] = (),
) -> tuple[Blocker, ...]:
    """The modules that hold most of a resource and that no compression makes smaller, largest first.

    Args:
        sites: Sites from `find_sites`, selected or not.
        resource: Name of the resource: "params", "macs" or "bytes".
        most: Maximum number of modules; None is all.
        frozen: Sites that the given families cannot cut, each with the reason.
        reduced: Paths of modules that are no sites and get smaller with them, such as norms.
    """
    frozen = frozen or {}
    whole = max(sites.whole.amounts()[resource], 1)
    skips = {skip.path: skip.reason for skip in sites.skips}
    cut = ({part.path for site in sites for part in site.parts} | set(reduced)) - _with_heads(sites, frozen)
    found = []
    for holding in sites.holdings:
        amount = holding.cost.amounts()[resource]
        if amount and holding.path not in cut:
            reason = _reason(holding, {**skips, **frozen})
            found.append(Blocker(holding.path, holding.kind, amount, amount / whole, reason))
    found.sort(key=lambda one: -one.amount)
    return tuple(found[:most])


def _with_heads(sites: Sites, paths: Collection[str]) -> set[str]:
    """Paths of layers, and of the heads of those that have one."""
    return {*paths, *(part.path for site in sites if site.path in paths for part in site.parts)}


def _reason(holding: Holding, known: Mapping[str, str]) -> str:
    """Reason why a module stays."""
    owner = holding.path.partition(".parametrizations")[0]  # what computes a weight belongs to the layer that reads it
    if (reason := known.get(holding.path, known.get(owner))) is not None:
        return reason
    return NO_MATRIX if holding.cost.bytes else NO_WEIGHT


def unreachable(
    original: Cost,
    bounds: Mapping[str, int],
    smallest: Mapping[str, int],
    *,
    sites: Sites | None,
    frozen: Mapping[str, str] | None = None,
    reduced: Collection[str] = (),
    cure: str = "",
) -> BudgetError:
    """The error for bounds that the smallest reachable model exceeds.

    Args:
        original: Cost of the whole original model.
        bounds: Bounds on the whole model, by resource; one of them is broken.
        smallest: Smallest reachable value of each resource.
        sites: Sites of the model, whose blockers are named; None where there is no model.
        frozen: Sites that the given families cannot cut, as for `blockers`.
        reduced: Modules as for `blockers`.
        cure: Advice beside a larger bound; "" is to allow more families.
    """
    whole = original.amounts()
    broken = [name for name, bound in bounds.items() if smallest[name] > bound]
    parts, unselected, unreduced = [], False, False
    for name in broken:
        text = f"{name} at most {bounds[name]} where the smallest is {smallest[name]}"
        text += f" ({smallest[name] / max(whole[name], 1):.4f} of {whole[name]})"
        left = () if sites is None else blockers(sites, name, most=None, frozen=frozen, reduced=reduced)
        if left:
            few, more = left[:5], left[5:]
            text += f"; what stays: {', '.join(map(str, few))}"
            text += f" and {len(more)} more ({sum(one.share for one in more):.4f})" if more else ""
        parts.append(text)
        unselected |= any(one.reason.startswith("not selected") for one in left)
        unreduced |= 2 * sum(one.amount for one in left) < smallest[name]
        unreduced |= any(one.reason == NOTHING_SMALLER for one in left)
    needed = ", ".join(f"{name}={math.ceil(1e4 * smallest[name] / max(whole[name], 1)) / 1e4:g}" for name in broken)
    cures = [f"raise the bound (at least {needed})"]
    cures += ["select more layers"] if unselected else []
    cures += [cure or "allow more families"] if unreduced else []
    return BudgetError(
        f"Budget.{broken[0]}",
        law="the smallest reachable model is within every bound",
        got=" and ".join(parts),
        cure=", or ".join(cures),
        smallest=dict(smallest),
    )

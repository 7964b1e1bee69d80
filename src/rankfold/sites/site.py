"""Sites, the layers that can be compressed, and skips, the layers that are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from rankfold.cost.resources import Cost, Holding
from rankfold.errors import SiteError, near_matches
from rankfold.graph.regions import Call, find_calls
from rankfold.graph.trace import Graph
from rankfold.layers import Geometry


@dataclass(frozen=True)
class Site:
    """A place that can be compressed. Holds no tensor.

    Attributes:
        path: Dotted path of the module; "" for a model that is itself one layer.
        aliases: Other paths of the same module.
        kind: Layer kind, as its adapter names it.
        geometry: Shape and wiring.
        calls: Spatial size of the input, and number of times the layer is applied in it (tokens of a linear layer; 1
            for a convolution), of every call in a forward on one sample. Counts are per sample.
        element_size: Bytes of one weight element.
        fixed: Reason why no other module can take the layer's place, where it can still lose channels; "" where one
            can.
        rows: Numbers of entries of the axis of samples at the calls on one sample alone: 1, or several, as for windows
            or where time is the first axis; empty where they are not known.
        head: The linear layer whose weight is the table of this one, which is compressed with it; None elsewhere.
    """

    path: str
    aliases: tuple[str, ...]
    kind: str
    geometry: Geometry
    calls: tuple[tuple[tuple[int, ...], int], ...]
    element_size: int
    fixed: str = ""
    rows: tuple[int, ...] = ()
    head: Site | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight over all groups, out × in/groups × kernel…; of a table, rows × entries."""
        if self.geometry.table is not None:
            return self.geometry.table.rows, self.geometry.outputs
        out, *rest = self.geometry.canonical_shape
        return (out * self.geometry.groups, *rest)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        own = sum(count * self.geometry.macs(size) for size, count in self.calls)
        return own if self.head is None else own + self.head.macs

    @property
    def paths(self) -> tuple[str, ...]:
        """The path and its aliases, and those of the head."""
        return (self.path, *self.aliases, *(() if self.head is None else self.head.paths))

    @property
    def parts(self) -> tuple[Site, ...]:
        """The site, and its head: the layers whose inputs are looked at."""
        return (self,) if self.head is None else (self, self.head)


@dataclass(frozen=True)
class Skip:
    """A layer left alone, with the reason.

    Attributes:
        path: Dotted path of the module.
        reason: Reason, as *kind: explanation*.
    """

    path: str
    reason: str

    @property
    def kind(self) -> str:
        """Kind of the reason, for counting: "tied", "quantised", "no room", …"""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, eq=False)
class Sites(Sequence[Site]):
    """The result of `find_sites`.

    Attributes:
        sites: Sites in the order of the model's modules.
        skips: Layers left alone: all that hold a weight of two or more axes and are no site.
        graph: The traced forward, or the reason why there is none.
        cost: Cost of the whole model.
        fingerprint: SHA-256 over the names, shapes and dtypes of the model's state.
        model: Name of the model's class.
        fixed: Layers among the skips that can lose channels, though no other module can take their place.
        holdings: Holdings of each module, the cost of its children left out, in the order of the model's modules.
        uncounted: Operators that multiply matrices, or may, and are in no count of MACs, with where they are called.
        original: Cost of the model before any channel was removed, where these are the sites of a narrowed one.
        split: Paths of the attention that was split into linear layers first: all else is of the model as that leaves
            it.
    """

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    graph: Graph
    cost: Cost
    fingerprint: str
    model: str
    fixed: tuple[Site, ...] = ()
    holdings: tuple[Holding, ...] = ()
    uncounted: tuple[str, ...] = ()
    original: Cost | None = None
    split: tuple[str, ...] = ()

    @property
    def whole(self) -> Cost:
        """Cost of the whole original model, to which every share refers."""
        return self.cost if self.original is None else self.original

    def smaller(self, sites: Sequence[Site], *, cost: Cost, fingerprint: str) -> Sites:
        """The sites of a smaller model made of this one; shares refer to the original all the same.

        Args:
            sites: Sites that are left, as they are in it.
            cost: Its cost.
            fingerprint: Its fingerprint.
        """
        return replace(self, sites=tuple(sites), cost=cost, fingerprint=fingerprint, original=self.whole)

    def in_graph(self) -> list[Call]:
        """Every call of the sites' layers in the graph, in its order; none where there is no graph."""
        names = {path: site.path for site in self for path in site.paths}
        heads = {site.path: site.head.path for site in self if site.head is not None}
        return [] if self.graph.program is None else find_calls(self.graph.program, names, heads)

    def with_fixed(self) -> Sites:
        """The same with the fixed layers among the sites, for the removal of channels."""
        paths = {site.path for site in self.fixed}
        skips = tuple(skip for skip in self.skips if skip.path not in paths)
        return replace(self, sites=(*self.sites, *self.fixed), skips=skips, fixed=())

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        """The site at a position."""
        return self.sites[index]

    def __len__(self) -> int:
        """Number of sites."""
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        """The sites."""
        return iter(self.sites)

    def at(self, path: str) -> Site:
        """The site at a path or alias.

        Raises:
            SiteError: There is none; near matches are named.
        """
        for site in self.sites:
            if path in site.paths:
                return site
        reason = next((skip.reason for skip in self.skips if skip.path == path), None)
        raise SiteError(
            repr(path),
            law="the path of a site",
            got=f"a skipped layer ({reason})" if reason else "an unknown path",
            cure=near_matches(path, [p for site in self.sites for p in site.paths]),
        )

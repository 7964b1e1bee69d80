"""Which layers can be compressed, and why the others cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.errors import ModelError, OptionError, SiteError, TraceError, is_out_of_memory, near_matches, shown
from rankfold.graph.models import check_model, check_module
from rankfold.graph.probe import observe, paths_of
from rankfold.graph.refusals import Context, why_entangled, why_unfit
from rankfold.graph.room import has_room
from rankfold.graph.trace import Batch, Graph, split_batch, trace
from rankfold.layers import Geometry, adapter_for
from rankfold.metrics.cost import Cost, Holding
from rankfold.metrics.counted import Counted, count_bytes, count_params, counted, holdings


@dataclass(frozen=True)
class Site:
    """A place that can be compressed. Holds no tensor.

    Attributes:
        path: Dotted path of the module; "" for a model that is itself one layer.
        aliases: Other paths of the same module.
        kind: Layer kind, as its adapter names it.
        geometry: Shape and wiring.
        calls: For every call of a forward on one sample: the spatial size of the input, and how often the layer is
            applied in it (tokens of a linear layer; 1 for a convolution). Counts are per sample.
        element_size: Bytes of one weight element.
        fixed: Why no other module can take the layer's place, where it can still lose channels; "" where one can.
        rows: How many entries the axis of samples has at a call of one sample alone: 1, or several, as of windows or
            where time stands in front; empty where that is not known.
    """

    path: str
    aliases: tuple[str, ...]
    kind: str
    geometry: Geometry
    calls: tuple[tuple[tuple[int, ...], int], ...]
    element_size: int
    fixed: str = ""
    rows: tuple[int, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight over all groups, out × in/groups × kernel…."""
        out, *rest = self.geometry.canonical_shape
        return (out * self.geometry.groups, *rest)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return sum(count * self.geometry.macs(size) for size, count in self.calls)

    @property
    def paths(self) -> tuple[str, ...]:
        """The path and its aliases."""
        return (self.path, *self.aliases)


@dataclass(frozen=True)
class Skip:
    """A layer left alone, with the reason.

    Attributes:
        path: Dotted path of the module.
        reason: Why, as *kind: explanation*.
    """

    path: str
    reason: str

    @property
    def kind(self) -> str:
        """Kind of the reason, for counting: "tied", "quantised", "no room", …"""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, eq=False)
class Sites(Sequence[Site]):
    """What `find_sites` found.

    Attributes:
        sites: In the order of the model's modules.
        skips: Everything that holds a weight of two or more axes and is no site.
        graph: The traced forward, or the reason why there is none.
        cost: Of the whole model.
        fingerprint: SHA-256 over the names, shapes and dtypes of the model's state.
        model: Name of the model's class.
        fixed: Layers among the skips that can lose channels, though no other module can take their place.
        holdings: What each module holds and multiplies itself, by path, in the order of the model's modules.
        uncounted: Operators that multiply matrices, or may, and are in no count of MACs, with where they are called.
        original: Cost of the model before any channel went, where these are the sites of a narrowed one.
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

    @property
    def whole(self) -> Cost:
        """Cost of the whole original model, which every share is a share of."""
        return self.cost if self.original is None else self.original

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


def find_sites(
    model: nn.Module, example: Batch, *, only: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Sites:
    """Find every layer that can be compressed, and the reason for every one that cannot.

    The model is run twice on one sample (once to count, once with a stand-in at every layer) and traced once, in eval
    mode, and left as it was.

    Args:
        model: The trained model, on a real device.
        example: One batch: a tensor, a tuple whose first item is the input, or a dict of keyword arguments.
        only: Paths or patterns (`*`, `?`) of the sites to keep; None keeps all.
        exclude: Paths or patterns of sites to leave alone, after `only`.

    Returns:
        The sites and skips, the graph, and the cost of the whole model.

    Raises:
        ModelError: The model is no module, or has tensors on meta, packed weights, compiled parts, weights that are not
            finite, or lazy weights that the forward would draw.
        TraceError: The forward fails on the example.
        OptionError: A selection is no list of strings.
        SiteError: A pattern matches nothing, and near matches are named; or the selection leaves no site.
    """
    model = check_model(model)
    check_selection(only, exclude)
    layers = {
        id(module): (module, adapter)
        for _, module, _ in paths_of(model)
        if why_unfit(module) is None and (adapter := adapter_for(module)) is not None
    }
    macs = _counted(model, example)
    seen = observe(model, example, layers)
    graph = trace(model, example)
    context = Context.of(model, graph, seen)
    sites, skips, fixed = [], [], []
    for path, module, aliases in paths_of(model):
        reason = why_unfit(module)
        if reason is None and id(module) in layers:
            reason = why_entangled(path, module, aliases, context)
        site = None
        if id(module) in layers and (reason is None or Skip(path, reason).kind == "read elsewhere"):
            _, adapter = layers[id(module)]
            size = adapter.canonical(module).element_size()
            own = seen[id(module)]
            rows = tuple(sorted(set(own.rows)))
            site = Site(path, aliases, adapter.kind, adapter.geometry(module), tuple(own.calls), size, rows=rows)
            if reason is None and not has_room(site):
                reason = "no room: no factorisation of rank 1 is smaller than the layer"
        if reason is not None:
            skips.append(Skip(path, reason))
            if site is not None and site.calls:  # one that is never called itself shows no inputs to solve it on
                fixed.append(replace(site, fixed=reason))
        elif site is not None:
            sites.append(site)
    found = Sites(
        tuple(sites),
        tuple(skips),
        graph,
        Cost(count_params(model), macs.macs, count_bytes(model)),
        fingerprint(model),
        type(model).__name__,
        tuple(fixed),
        holdings(model, macs.by_module),
        macs.missed,
    )
    return select(found, only=only, exclude=exclude)


def select(found: Sites, *, only: Sequence[str] | None, exclude: Sequence[str] = ()) -> Sites:
    """The sites that match `only` and not `exclude`; the others become skips.

    Raises:
        OptionError: A selection is no list of strings.
        SiteError: A pattern matches no site and no skip, a path in `only` is of a layer that cannot be compressed, or
            no site is left.
    """
    check_selection(only, exclude)
    known = [path for site in found.sites for path in site.paths]
    skipped = {skip.path: skip.reason for skip in found.skips}
    for pattern in [*(only or ()), *exclude]:
        if not any(fnmatchcase(path, pattern) for path in [*known, *skipped]):
            below = any(path.startswith(f"{pattern}.") for path in [*known, *skipped])
            raise SiteError(
                repr(pattern),
                law="a selection names layers of the model",
                got="no match",
                cure=f"for all below it: '{pattern}.*'" if below else near_matches(pattern, known),
            )
    for path in only or ():
        if path in skipped and path not in known:
            raise SiteError(
                repr(path),
                law="a selection names layers that can be compressed",
                got=f"a skipped layer ({skipped[path]})",
                cure="take it out of the selection",
            )

    def matches(site: Site, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, pattern) for path in site.paths for pattern in patterns)

    kept, skips = [], list(found.skips)
    for site in found.sites:
        if only is not None and not matches(site, only):
            skips.append(Skip(site.path, "not selected: it is not among `only`"))
        elif matches(site, exclude):
            skips.append(Skip(site.path, "not selected: it is among `exclude`"))
        else:
            kept.append(site)
    if found.sites and not kept:
        raise SiteError(
            "only" if only is not None else "exclude",
            law="the selection leaves a layer that can be compressed",
            got=f"an empty selection, none of {len(found.sites)} layers",
            cure="leave `only` out for all layers" if only is not None and not only else "take a pattern out",
        )
    fixed = tuple(site for site in found.fixed if (only is None or matches(site, only)) and not matches(site, exclude))
    return replace(found, sites=tuple(kept), skips=tuple(skips), fixed=fixed)


def check_selection(only: Sequence[str] | None, exclude: Sequence[str]) -> None:
    """Refuse a selection that is no list of strings.

    Raises:
        OptionError: A bare string, something else than a list, or an item that is no string.
    """
    for name, patterns in (("only", only), ("exclude", exclude)):
        if name == "only" and patterns is None:
            continue
        a_list = isinstance(patterns, Collection) and not isinstance(patterns, (str, bytes))
        if a_list and all(isinstance(pattern, str) for pattern in patterns or ()):
            continue
        raise OptionError(
            name,
            law="a list of paths or patterns",
            got=shown(patterns),
            cure=f"try {name}=[{patterns!r}]" if isinstance(patterns, str) else "pass strings, or leave it out",
        )


def check_sites(model: nn.Module, sites: Sites) -> nn.Module:
    """Refuse sites that are not this model's.

    Returns:
        The plain model; see `check_module`.

    Raises:
        OptionError: They are not what `find_sites` returns.
        ModelError: The model is no module, or has tensors on meta.
        SiteError: They are of another model; the first layer that is missing is named.
    """
    model = check_module(model)
    if not isinstance(sites, Sites):
        raise OptionError(
            "sites",
            law="what rankfold.find_sites returned",
            got=shown(sites),
            cure="pass rankfold.find_sites(model, example)",
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = next((site.path for site in sites if site.path not in modules), None)
    if missing is not None:
        raise SiteError(
            repr(missing),
            law="every site is a layer of the model",
            got=f"sites of another model, a {sites.model}",
            cure="find the sites of this model",
        )
    own = fingerprint(model)
    if sites.fingerprint != own:
        raise SiteError(
            "sites",
            law="sites of a model with the same parameter names, shapes and dtypes",
            got=f"fingerprint {sites.fingerprint[:12]} against {own[:12]} of this {type(model).__name__}",
            cure="find the sites of this model",
        )
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the sorted names, shapes and dtypes of the state dict: the structure, not the numbers."""
    lines = sorted(
        f"{name} {'lazy' if is_lazy(value) else tuple(value.shape)} {value.dtype}"
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _counted(model: nn.Module, example: Batch) -> Counted:
    """MACs per sample of the whole model, on a first run that also shows whether the model runs at all."""
    handles = [
        module.register_forward_pre_hook(_refuse_lazy(path), prepend=True)
        for path, module in model.named_modules()
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False))
    ]
    try:
        return counted(model, example)
    except ModelError:
        raise
    except Exception as cause:
        if is_out_of_memory(cause):
            raise
        args, kwargs = split_batch(example)
        values = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        shapes = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in values.items()}
        raise TraceError(
            type(model).__name__,
            law="the model runs on a batch of the data",
            got=f"{cause} for inputs {shapes}",
            cure="check the shape, dtype and argument names of the data" + _several(example),
        ) from cause
    finally:
        for handle in handles:
            handle.remove()


def _several(batch: Batch) -> str:
    """What to do where a batch seems to be meant as several inputs."""
    if not isinstance(batch, (tuple, list)) or sum(isinstance(value, Tensor) for value in batch) < 2:
        return ""
    return "; of a tuple only the first item is the input: give several inputs as a dict of keyword arguments"


def _refuse_lazy(path: str) -> Callable[[nn.Module, Any], None]:
    """A hook that keeps a lazy layer from drawing its weights, which would change the model."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        raise ModelError(
            repr(path),
            law="every layer that the forward reaches has its weights",
            got=f"a {type(module).__name__} whose weight has no shape yet",
            cure="run the model once, and train or load it, before compressing it",
        )

    return refuse

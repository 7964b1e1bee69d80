"""The search for layers that can be compressed, and for the reasons why the others cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.cost.counted import Counted, amounts_of, counted, holdings
from rankfold.data.batches import Batch, split_batch
from rankfold.errors import ModelError, OptionError, SiteError, TraceError, is_out_of_memory, near_matches, shown
from rankfold.graph.regions import readers_of
from rankfold.graph.trace import trace
from rankfold.layers import Adapter, adapter_for, tensor
from rankfold.layers.splitting import split_at
from rankfold.layers.tied import head_geometry, heads_of
from rankfold.sites.models import check_model, check_module
from rankfold.sites.probe import Seen, observe, paths_of
from rankfold.sites.refusals import Context, why_entangled, why_unfit
from rankfold.sites.room import has_room
from rankfold.sites.site import Site, Sites, Skip
from rankfold.sites.splitting import Split, split_where_same


def find_sites(
    model: nn.Module, example: Batch, *, only: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Sites:
    """Find every layer that can be compressed, and the reason for every one that cannot.

    The model is run twice on one sample (once to count, once with a stand-in at every layer) and traced once, in eval
    mode, and left as it was. Where it holds an `nn.MultiheadAttention`, all that is done on a copy in which each is
    split into linear layers (`split_attention`), if that copy computes the same on the example; `split` names them, and
    sites in them have paths such as `encoder.layers.0.self_attn.q`.

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
    return sites_in(model, example, only=only, exclude=exclude)[1]


def sites_in(
    model: nn.Module,
    example: Batch,
    *,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    split: Sequence[str] | None = None,
) -> tuple[nn.Module, Sites]:
    """The sites, as `find_sites` finds them, and the model that they are of.

    Args:
        model: The trained model.
        example: One batch.
        only: As for `find_sites`.
        exclude: As for `find_sites`.
        split: Paths of the attention that is split, as in a plan; None tries which can be.

    Returns:
        The model with its attention split, the very same object where nothing is, and the sites.
    """
    given = model = check_model(model)
    check_selection(only, exclude)
    macs = _counted(model, example)  # also shows whether it runs at all
    parts = split_where_same(model, example) if split is None else Split.at(model, split)
    if parts.model is not model:
        model = parts.model
        macs = _counted(model, example)
    layers = {
        id(module): (module, adapter)
        for _, module, _ in paths_of(model)
        if why_unfit(module) is None and (adapter := adapter_for(module)) is not None
    }
    seen = observe(model, example, layers)
    graph = trace(model, example)
    context = Context.of(model, graph, seen)
    readers = {} if graph.program is None else readers_of(graph.program)
    sites, skips, fixed = [], [], []
    tied = _tied(model, context, {key: adapter for key, (_, adapter) in layers.items()})
    heads = {site.head.path for site in tied.values() if site.head is not None}
    for path, module, aliases in paths_of(model):
        if path in heads:
            continue
        if path in tied:
            sites.append(tied[path])
            continue
        reason = parts.whole.get(path, why_unfit(module))
        if reason is None and id(module) in layers:
            reason = why_entangled(path, module, aliases, context)
        site = None
        if id(module) in layers and (reason is None or Skip(path, reason).kind == "read elsewhere"):
            _, adapter = layers[id(module)]
            site = _site(path, module, aliases, adapter, seen[id(module)])
            if reason is None and not has_room(site):
                reason = "no room: no factorisation of rank 1 is smaller than the layer"
        if reason is not None:
            skips.append(Skip(path, reason))
            # A layer that is never called itself shows no inputs to solve it on. Where an operator of another kind
            # reads its weight too (a decoder's, its encoder's), channels are read and made along other axes there.
            if site is not None and site.calls and not _misread(site, layers[id(module)][1], readers):
                fixed.append(replace(site, fixed=reason))
        elif site is not None:
            sites.append(site)
    found = Sites(
        tuple(sites),
        tuple(skips),
        graph,
        amounts_of(model, macs),
        fingerprint(model),
        type(given).__name__,
        tuple(fixed),
        holdings(model, macs.by_module),
        macs.missed,
        split=parts.paths,
    )
    return model, select(found, only=only, exclude=exclude)


def _misread(site: Site, adapter: Adapter, readers: Mapping[str, set[str]]) -> bool:
    """Whether an operator of another layer kind reads a layer's weight; kinds that name no operator may have any."""
    own = {operator.name for operator in adapter.operators}
    names = (f"{path}.weight" if path else "weight" for path in site.paths)
    return bool(own) and any(readers.get(name, set()) - own for name in names)


def _site(path: str, module: nn.Module, aliases: tuple[str, ...], adapter: Adapter, seen: Seen) -> Site:
    """The site of a layer, by its record in the forward."""
    size, rows = tensor(module, "weight").element_size(), tuple(sorted(set(seen.rows)))
    return Site(path, aliases, adapter.kind, adapter.geometry(module), tuple(seen.calls), size, rows=rows)


def _tied(model: nn.Module, context: Context, adapters: Mapping[int, Adapter]) -> dict[str, Site]:
    """Sites of the tables whose weight is a head's too, with that head, by path of the table."""
    every = {path: (module, aliases) for path, module, aliases in paths_of(model)}
    found = {}
    for table, head in heads_of(model).items():
        (own, names), (other, others) = every[table], every[head]
        if id(own) not in adapters or id(other) not in adapters:
            continue
        reasons = (
            why_entangled(table, own, names, context, (other, (head, *others))),
            why_entangled(head, other, others, context, (own, (table, *names))),
        )
        if reasons != (None, None):
            continue
        end = _site(head, other, others, adapters[id(other)], context.seen[id(other)])
        site = _site(table, own, names, adapters[id(own)], context.seen[id(own)])
        site = replace(site, head=replace(end, geometry=head_geometry(other)))
        if has_room(site):
            found[table] = site
    return found


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
        The plain model (see `check_module`), with its attention split as the sites name it: a copy that shares tensors
        with the model, or the model itself where nothing is to be split.

    Raises:
        OptionError: The sites are not what `find_sites` returns.
        ModelError: The model is no module, or has tensors on meta.
        SiteError: The sites are of another model; the first layer that is missing is named.
    """
    model = check_module(model)
    if not isinstance(sites, Sites):
        raise OptionError(
            "sites",
            law="what rankfold.find_sites returned",
            got=shown(sites),
            cure="pass rankfold.find_sites(model, example)",
        )
    model = split_at(model, sites.split)
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
    """Advice where a batch seems to be meant as several inputs; "" elsewhere."""
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

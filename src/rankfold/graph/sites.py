"""Which layers can be compressed, and why the others cannot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from rankfold.errors import ModelError, SiteError, TraceError, near_matches
from rankfold.factors import Rank
from rankfold.graph.trace import Batch, Graph, split_batch, trace
from rankfold.layers import Geometry, adapter_for, forms, stages, why_no_adapter
from rankfold.metrics.cost import Cost
from rankfold.metrics.counted import count_bytes, count_params, run_one


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
    """

    path: str
    aliases: tuple[str, ...]
    kind: str
    geometry: Geometry
    calls: tuple[tuple[tuple[int, ...], int], ...]
    element_size: int

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
    """A layer left alone, with the reason."""

    path: str
    reason: str


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
    """

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    graph: Graph
    cost: Cost
    fingerprint: str
    model: str

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

    The model is run once on one sample and traced once, in eval mode, and left as it was.

    Args:
        model: The trained model, on a real device.
        example: One batch: a tensor, a tuple whose first item is the input, or a dict of keyword arguments.
        only: Paths or patterns (`*`, `?`) of the sites to keep; None keeps all.
        exclude: Paths or patterns of sites to leave alone, after `only`.

    Returns:
        The sites and skips, the graph, and the cost of the whole model.

    Raises:
        ModelError: The model is no module, or has tensors on meta or weights that are not finite.
        TraceError: The forward fails on the example.
        SiteError: A pattern matches nothing; near matches are named.
    """
    check_model(model)
    calls, macs = _record_calls(model, example)
    graph = trace(model, example)
    readers = _weight_readers(graph)
    sites, skips = [], []
    for path, module, aliases in _modules(model):
        reason = _why_not(model, path, module, aliases, calls.get(id(module)), readers)
        if reason is not None:
            skips.append(Skip(path, reason))
        elif (adapter := adapter_for(module)) is not None:
            weight = adapter.canonical(module)
            site = Site(
                path, aliases, adapter.kind, adapter.geometry(module), tuple(calls[id(module)]), weight.element_size()
            )
            if _has_room(site):
                sites.append(site)
            else:
                skips.append(Skip(path, "no room: no factorisation of rank 1 is smaller than the layer"))
    found = Sites(
        tuple(sites),
        tuple(skips),
        graph,
        Cost(count_params(model), macs, count_bytes(model)),
        fingerprint(model),
        type(model).__name__,
    )
    return select(found, only=only, exclude=exclude)


def select(found: Sites, *, only: Sequence[str] | None, exclude: Sequence[str] = ()) -> Sites:
    """The sites that match `only` and not `exclude`; the others become skips.

    Raises:
        SiteError: A pattern matches no site and no skip.
    """
    known = [path for site in found.sites for path in site.paths]
    for pattern in [*(only or ()), *exclude]:
        if not any(fnmatchcase(path, pattern) for path in [*known, *(skip.path for skip in found.skips)]):
            raise SiteError(
                repr(pattern),
                law="a selection names layers of the model",
                got="no match",
                cure=near_matches(pattern, known),
            )

    def matches(site: Site, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, pattern) for path in site.paths for pattern in patterns)

    kept, skips = [], list(found.skips)
    for site in found.sites:
        if only is not None and not matches(site, only):
            skips.append(Skip(site.path, "not in the selection"))
        elif matches(site, exclude):
            skips.append(Skip(site.path, "excluded by the selection"))
        else:
            kept.append(site)
    return replace(found, sites=tuple(kept), skips=tuple(skips))


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, has tensors on meta, or weights that are not finite.

    Raises:
        ModelError: Naming the tensor.
    """
    if not isinstance(model, nn.Module):
        raise ModelError("model", law="an nn.Module", got=type(model).__name__, cure="pass the module itself")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                name,
                law="every tensor is on a real device",
                got="a tensor on meta",
                cure="load the weights on a device first (model.to_empty holds no weights)",
            )
    for name, tensor in model.named_parameters():
        lazy = isinstance(tensor, UninitializedParameter)
        if not lazy and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                name,
                law="every weight is finite",
                got=f"{bad} of {tensor.numel()} NaN or infinite",
                cure="look at how the model was trained or loaded",
            )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the sorted names, shapes and dtypes of the state dict: the structure, not the numbers."""
    lines = sorted(
        f"{name} {tuple(value.shape) if not isinstance(value, UninitializedParameter) else 'lazy'} {value.dtype}"
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _record_calls(model: nn.Module, example: Batch) -> tuple[dict[int, list[tuple[tuple[int, ...], int]]], int]:
    """For every called module with an adapter its calls per sample, and the whole model's MACs per sample."""
    seen: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    handles = []
    for module in model.modules():
        adapter = adapter_for(module)
        if adapter is None or not isinstance(getattr(module, "weight", None), Tensor):
            continue

        def record(layer: nn.Module, inputs: Any, adapter: Any = adapter) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(id(layer), []).append(adapter.sample_size(layer, inputs[0]))

        handles.append(module.register_forward_pre_hook(record))
    try:
        with FlopCounterMode(display=False) as counter:
            samples = run_one(model, example)
    except Exception as cause:
        args, kwargs = split_batch(example)
        values = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        shapes = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in values.items()}
        raise TraceError(
            type(model).__name__,
            law="the model runs on a batch of the data",
            got=f"{cause} for inputs {shapes}",
            cure="check the shape, dtype and argument names of the data",
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    calls = {key: [(size, max(1, round(count / samples))) for size, count in sizes] for key, sizes in seen.items()}
    return calls, counter.get_total_flops() // (2 * samples)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Each module once: its first path, itself, and its other paths."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for path, module in model.named_modules():
        yield path, module, tuple(paths[id(module)][1:])


def _weight_readers(graph: Graph) -> dict[str, set[str]] | None:
    """For every parameter name the innermost module paths whose code reads it; None without a graph."""
    if graph.program is None:
        return None
    signature = graph.program.graph_signature
    readers: dict[str, set[str]] = {}
    for node in graph.program.graph.nodes:
        name = signature.inputs_to_parameters.get(node.name)
        if node.op != "placeholder" or name is None:
            continue
        paths = set()
        for user in node.users:
            stack = list((user.meta.get("nn_module_stack") or {}).values())
            paths.add(re.sub(r"@\d+", "", stack[-1][0]) if stack else "")
        readers[name] = paths
    return readers


def _why_not(
    model: nn.Module,
    path: str,
    module: nn.Module,
    aliases: tuple[str, ...],
    calls: list[tuple[tuple[int, ...], int]] | None,
    readers: dict[str, set[str]] | None,
) -> str | None:
    """Why a module that holds a weight is no site; "" is never returned; None for a site or a module without weight."""
    own = dict(module.named_parameters(recurse=False))
    if not own and not parametrize.is_parametrized(module):
        quantised = not isinstance(getattr(module, "weight", None), (Tensor, type(None)))
        return "quantised: the weight is packed" if quantised else None
    if any(isinstance(parameter, UninitializedParameter) for parameter in own.values()):
        return "lazy: the weight has no shape yet; run the model once first"
    if parametrize.is_parametrized(module):
        return "parametrised: the weight is computed from other tensors (remove the parametrisation first)"
    wide = [name for name, parameter in own.items() if parameter.ndim >= 2]
    if not wide:
        return None
    why = why_no_adapter(module)
    if why is not None:
        return why
    weight = own.get("weight")
    if weight is None:
        return f"parametrised: the weight is computed from {', '.join(sorted(own))}"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"quantised: the weight is a {type(weight.data).__name__} of {weight.dtype}"
    others = [
        f"{other}.{name}" if other else name
        for other, owner in model.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if owner is not module and any(parameter is mine for mine in own.values())
    ]
    if others:
        return f"tied: the weight is also {', '.join(others[:3])}"
    if not calls:
        return "not called in the forward on the example (or only its weight is read)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which would be lost with the layer"
    if readers is not None:
        for name in own:
            full = f"{path}.{name}" if path else name
            strangers = readers.get(full, set()) - {path, *aliases}
            if strangers:
                where = ", ".join(repr(stranger) for stranger in sorted(strangers)[:3])
                return f"its {name} is also read by the code of {where}"
    return None


def _has_room(site: Site) -> bool:
    """Whether some form at its smallest rank has fewer parameters, or fewer MACs, than the layer."""
    from rankfold.metrics.cost import dense_cost, site_cost

    dense = dense_cost(site)
    for form in forms():
        rank = smallest_rank(form, site.geometry)
        if rank is None or prod(part.n_weights for part in stages(site.geometry, form, rank)) == 0:
            continue
        cost = site_cost(site, form, rank)
        if cost.params < dense.params or cost.macs < dense.macs:
            return True
    return False


def smallest_rank(form: str, geometry: Geometry) -> Rank | None:
    """The smallest rank of a form, or None where the form has no case in this geometry."""
    kernel = geometry.kernel
    if form == "matrix":
        return 1
    if form == "mirrored":
        return 1 if any(size > 1 for size in kernel) else None
    if form == "spatial":
        return 1 if len(kernel) == 2 and min(kernel) > 1 else None
    return None

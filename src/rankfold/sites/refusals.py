"""Reasons why a layer that holds a weight is left alone. Every reason reads *kind: explanation*."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rankfold.graph.trace import Graph
from rankfold.layers import why_no_adapter
from rankfold.sites.probe import Seen

BY_BATCH = "one sample alone does not reach it, the whole batch does, so it is in no count of MACs"


@dataclass(frozen=True, eq=False)
class Context:
    """Facts of one model by which its layers are judged.

    Attributes:
        owners: Pairs (module, dotted name) of the parameters, by the memory address at which they start.
        readers: Innermost module paths whose code reads a parameter, by its name; None without a graph.
        seen: Record of each layer in the forward, by identity of the layer.
    """

    owners: dict[int, list[tuple[nn.Module, str]]]
    readers: dict[str, set[str]] | None
    seen: dict[int, Seen]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, seen: dict[int, Seen]) -> Context:
        """The facts of a model."""
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not is_lazy(parameter):
                    owners.setdefault(address(parameter), []).append((module, f"{path}.{name}" if path else name))
        return cls(owners, _weight_readers(graph), seen)


def address(tensor: Tensor) -> int:
    """Address at which a tensor's memory starts: equal for a parameter and its aliases. A tensor without memory of its
    own (empty, or a subclass that wraps others) is identified by its object.
    """
    if type(tensor.data) is Tensor and tensor.layout is torch.strided and tensor.numel():
        return tensor.data_ptr()
    return -id(tensor)


def why_unfit(module: nn.Module) -> str | None:
    """Reason why a module by itself is no site; None where there is none, or where it holds no tensor of two axes."""
    if isinstance(module, parametrize.ParametrizationList):
        return None  # the reason is given for its owner
    own = dict(module.named_parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in own.values()):
        return "lazy: the weight has no shape yet, and the forward does not reach it"
    if parametrize.is_parametrized(module):
        return "parametrised: the weight is computed from other tensors (remove the parametrisation first)"
    if not own:
        return _why_packed(module)
    if not any(parameter.ndim >= 2 for parameter in own.values()):
        return None
    if (why := why_no_adapter(module)) is not None:
        return f"unsupported: {why}"
    weight = own.get("weight")
    if weight is None:
        return f"parametrised: the weight is computed from {', '.join(sorted(own))}"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
        return f"quantised or sharded: the weight is a {kind.__name__}, no plain tensor"
    if not weight.is_floating_point():
        return f"quantised: the weight is of {weight.dtype}"
    if weight.layout is not torch.strided:
        return f"unsupported: the weight is of {weight.layout}"
    if "forward" in vars(module):
        return "overridden: the layer has been given a forward of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "hooked: it has hooks, which would be lost with the layer"
    return None


def why_entangled(
    path: str,
    module: nn.Module,
    aliases: tuple[str, ...],
    context: Context,
    partner: tuple[nn.Module, tuple[str, ...]] | None = None,
) -> str | None:
    """Reason why the rest of the model rules out a layer that is fit by itself; None for a site.

    Args:
        path: Path of the layer.
        module: The layer.
        aliases: Its other paths.
        context: Facts of the model.
        partner: The other layer of a table and its head, with all its paths: it may hold and read the weight.
    """
    other, theirs = (None, ()) if partner is None else partner
    own = dict(module.named_parameters(recurse=False))
    others = [
        name
        for parameter in own.values()
        for owner, name in context.owners.get(address(parameter), ())
        if owner is not module and owner is not other
    ]
    if others:
        return f"tied: the weight is also {', '.join(others[:3])}"
    seen = context.seen.get(id(module), Seen())
    if seen.misuse is not None:
        return seen.misuse
    if seen.by_batch:
        return f"not called: {BY_BATCH}"
    if not seen.calls:
        return "not called: the forward on the example does not reach it"
    for name in own if context.readers is not None else ():
        full = f"{path}.{name}" if path else name
        strangers = (context.readers or {}).get(full, set()) - {path, *aliases, *theirs}
        if strangers:
            where = ", ".join(repr(stranger) for stranger in sorted(strangers)[:3])
            return f"read elsewhere: its {name} is also read by the code of {where}"
    return None


def _why_packed(module: nn.Module) -> str | None:
    """Reason why a module without parameters is left alone, where it keeps a weight in another form; None elsewhere."""
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, nn.Module):
        return "quantised: the weight is packed"
    for name, buffer in module.named_buffers(recurse=False):
        if "weight" in name and buffer.ndim >= 2:
            return f"quantised: the weight is the buffer {name} of {buffer.dtype}"
    return None


def _weight_readers(graph: Graph) -> dict[str, set[str]] | None:
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

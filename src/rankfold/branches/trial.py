"""Whether branches can go: a copy without them must run, and compute what the graph computes without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.branches.finding import Branch, BranchError, first_names, without
from rankfold.branches.installing import install_stands_
from rankfold.branches.stands import places_of_stands
from rankfold.comparison.misfit import misfit
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import is_out_of_memory
from rankfold.graph.trace import Graph, followed_output
from rankfold.graph.walk import Walk, weights_of
from rankfold.layers.stands import BYPASS, CONSTANT, Always, Constant, Stand
from rankfold.sites.copies import copied

FEW = 4  # samples that a model without branches is tried on, where it takes a batch of any size


def stands_of(model: nn.Module, graph: Graph, gone: Sequence[Branch], example: Batch) -> dict[str, tuple[str, Stand]]:
    """What takes the place of modules when some branches go.

    The model is tried with it on a few samples: with numbers for the constants that are drawn for this alone, it must
    compute what the graph gives with the same numbers. Code that adds in place gets constants as large as their input.

    Args:
        model: The original; not changed.
        graph: Its traced forward.
        gone: The branches.
        example: One batch.

    Returns:
        By path of the module that goes: the branch that ends there ("" for modules that only go with one), and the
        stand.

    Raises:
        BranchError: The branches cannot go; the message is the reason.
    """
    if graph.program is None:
        raise BranchError(f"there is no graph: {graph.reason}")
    try:
        return _stands(model, graph, gone, example, whole=True)
    except BranchError:
        return _stands(model, graph, gone, example, whole=False)


def _stands(
    model: nn.Module, graph: Graph, gone: Sequence[Branch], example: Batch, *, whole: bool
) -> dict[str, tuple[str, Stand]]:
    if graph.program is None:
        raise TypeError("there is no graph")
    places = places_of_stands(graph.program, gone, first_names(model), whole=whole)
    _check_alone(model, [*places.bypasses, *places.constants.values()])
    example = to_device(example, device_of(model))
    if graph.static_batch is None:
        example = take(example, torch.arange(min(FEW, batch_size(example))))
    items = _items(model, [*places.bypasses, *places.constants.values()], example)
    branches = {branch.name: branch for branch in gone}
    found = {path: ("", Stand(BYPASS, items[path], copied=path not in places.idle)) for path in places.bypasses}
    for name, path in places.constants.items():
        if branches[name].channels == 0:
            raise BranchError("the channels of its last layer lie elsewhere in what is added")
        found[path] = name, Stand(CONSTANT, items[path], branches[name].channels, branches[name].axes)
    try:
        _try(model, graph, gone, found, example)
    except BranchError:
        found = {
            path: (name, replace(stand, full=True) if stand.kind == CONSTANT else stand)
            for path, (name, stand) in found.items()
        }
        if not places.constants:
            raise
        _try(model, graph, gone, found, example)
    return found


def _try(
    model: nn.Module, graph: Graph, gone: Sequence[Branch], found: dict[str, tuple[str, Stand]], example: Batch
) -> None:
    """Raise `BranchError` if a copy with stands does not run, or computes something else than the graph."""
    if graph.program is None:
        raise TypeError("there is no graph")
    small = install_stands_(copied(model), {path: stand for path, (_, stand) in found.items()})
    constants = _drawn(small, found)
    calls, dead = without(graph.program, gone)

    def left(arrival: Any) -> nn.Module:
        first: Tensor = arrival.outputs[0]
        name = arrival.call.path
        axes = next(branch.axes for branch in gone if branch.name == name)
        return Always(constants.get(name, first.new_zeros([1] * (axes + 1))))

    walked = Walk(graph.program, weights_of(model), calls, [example], left, {}, dead=dead)
    with evaluating(model):
        before, expected = ([leaf for leaf in side if _is_float(leaf)] for side in walked.run()[0])
    try:
        with evaluating(small):
            output = followed_output(run(small, example))
    except Exception as cause:  # whatever the model's own code raises
        if is_out_of_memory(cause):
            raise
        raise BranchError(f"{type(cause).__name__}: {cause}".splitlines()[0][:120]) from cause
    got = [leaf for leaf in _pytree.tree_leaves(output) if _is_float(leaf)]
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        raise BranchError("its outputs have other shapes")
    if not all(misfit(*each).worst <= 1 for each in zip(got, expected, before, strict=True)):
        raise BranchError("it computes something else")


def _drawn(small: nn.Module, found: dict[str, tuple[str, Stand]]) -> dict[str, Tensor]:
    """Give each constant numbers that tell its channels apart; by name of the branch, as the graph adds them."""
    modules = dict(small.named_modules(remove_duplicate=False))
    constants = {}
    for path, (name, stand) in found.items():
        module = modules[path]
        if isinstance(module, Constant):
            with torch.no_grad():
                module.bias.copy_(torch.linspace(-0.5, 0.5, stand.channels))
            constants[name] = module.bias.detach().reshape(-1, *[1] * stand.axes)
    return constants


def _check_alone(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise `BranchError` if a module below some paths also stands outside of them."""
    tops = {id(model.get_submodule(path)) for path in paths}
    inside = {id(module) for path in paths for module in model.get_submodule(path).modules()}
    for parent in model.modules():
        if id(parent) not in inside:
            for name, child in parent.named_children():
                if id(child) in inside and id(child) not in tops:
                    raise BranchError(f"{name} in it stands elsewhere too")


def _items(model: nn.Module, paths: Sequence[str], example: Batch) -> dict[str, tuple[bool, ...]]:
    """Which items of each module's output are tensors; none where the output is one itself."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[str, Any] = {}

    def note(path: str) -> Any:
        return lambda _module, _args, output: seen.setdefault(path, output)

    handles = [modules[path].register_forward_hook(note(path)) for path in paths]
    try:
        with evaluating(model):
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    items: dict[str, tuple[bool, ...]] = {}
    for path in paths:
        output = seen.get(path)
        if isinstance(output, Tensor):
            items[path] = ()
        elif isinstance(output, (tuple, list)) and all(each is None or isinstance(each, Tensor) for each in output):
            items[path] = tuple(isinstance(each, Tensor) for each in output)
        else:
            kind = "is not called as a module" if path not in seen else f"returns a {type(output).__name__}"
            raise BranchError(f"{path} {kind}")
    return items


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()

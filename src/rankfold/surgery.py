"""Plan + model → model with shells in place, filled or still empty; and back to dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.channels.narrowing import Attributes, Cuts, kept_of, narrow_, narrowed_geometry
from rankfold.curves import moments_of
from rankfold.decompositions import factorise
from rankfold.errors import ModelError, PlanError, near_matches, shown
from rankfold.factors import Factors
from rankfold.graph.models import check_in_place, check_module
from rankfold.graph.sites import Site, fingerprint
from rankfold.graph.trace import Batch
from rankfold.layers import Geometry, adapter_for, build_shell, dense_geometry, fill_shell, stages, tensor
from rankfold.linalg.precision import widen
from rankfold.metrics.counted import run_one
from rankfold.plan import Decision, Plan
from rankfold.statistics import Statistics

Fill: TypeAlias = Callable[[Decision, nn.Module, nn.Sequential], None]


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check a plan against a model before anything is changed.

    Raises:
        PlanError: The plan is of another model, names a module that is not there or no layer of a known kind, decides
            twice on a module with two names, or asks for a rank the layer cannot have.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            "plan", law="a rankfold.Plan", got=shown(plan), cure="pass the plan, or Plan.from_json(text) of its file"
        )
    if plan.fingerprint != fingerprint(model):
        raise PlanError(
            plan.model or "plan",
            law="the plan is of a model with the same parameter names, shapes and dtypes",
            got=f"fingerprint {plan.fingerprint[:12]} against {fingerprint(model)[:12]} of this {type(model).__name__}",
            cure="make a plan for this model",
        )
    check_channels(model, plan)
    check_cuts(model, plan.cuts)
    check_attributes(model, plan.attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
    decided: dict[int, str] = {}
    for decision in plan.decisions:
        if decision.site not in modules:
            raise PlanError(
                repr(decision.site),
                law="the path of a module",
                got="no such module",
                cure=near_matches(decision.site, modules),
            )
        module = modules[decision.site]
        other = decided.setdefault(id(module), decision.site)
        if other != decision.site:
            raise PlanError(
                repr(decision.site),
                law="one decision a module",
                got=f"another one at {other!r}, which is the same module",
                cure="remove one of the two",
            )
        adapter = adapter_for(module)
        if adapter is None:
            raise PlanError(
                repr(decision.site),
                law="a layer of a known kind",
                got=type(module).__name__,
                cure="take the decision out of the plan",
            )
        if decision.method is None:
            continue
        kept = kept_of(decision.site, module, plan.cuts)
        shape = narrowed_geometry(adapter.geometry(module), kept).canonical_shape
        why = decision.method.refuses(shape)
        if why is None and (decision.rank is None or not decision.method.admits(shape, decision.rank)):
            ranks = decision.method.candidates(shape)
            why = f"a rank between {ranks[0]} and {ranks[-1]}"
        if why is not None:
            raise PlanError(
                repr(decision.site),
                law=why,
                got=f"{decision.method} at rank {shown(decision.rank)}",
                cure="correct the plan",
            )


def check_channels(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that says channels go, and does not say which.

    Raises:
        PlanError: Naming the group.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for decision in plan.channels:
        if decision.group not in modules:
            raise PlanError(
                repr(decision.group),
                law="a group is named by a layer of the model",
                got="no such layer",
                cure=near_matches(decision.group, modules),
            )
    if plan.channels and not plan.cuts:
        raise PlanError(
            "cuts",
            law="where channels go, cuts say what stays of every tensor",
            got=f"{len(plan.channels)} groups that lose channels and no cuts",
            cure="take the channels out of the plan, too, or make the plan again",
        )


def check_cuts(model: nn.Module, cuts: Cuts) -> None:
    """Refuse cuts that do not fit a model.

    Raises:
        PlanError: Naming the tensor.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, axes in cuts.items():
        if name not in tensors:
            raise PlanError(
                repr(name), law="a parameter or buffer of the model", got="no such", cure=near_matches(name, tensors)
            )
        for axis, kept in axes.items():
            shape = tuple(tensors[name].shape)
            if axis >= len(shape) or not kept or kept[-1] >= shape[axis]:
                raise PlanError(
                    repr(name),
                    law=f"indices that stay along axis {axis} of a tensor of shape {shape}",
                    got=shown(list(kept)),
                    cure="make the plan again",
                )
    _check_layers(model, cuts)


def _check_layers(model: nn.Module, cuts: Cuts) -> None:
    """Refuse cuts by which the tensors of one layer or norm keep different output channels."""
    names: dict[int, list[str]] = {}  # of a module that stands in several places
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(f"{path}." if path else "")
    for path, module in model.named_modules():
        adapter = adapter_for(module)
        if adapter is not None:
            places = {"weight": adapter.weight_axes[0], "bias": 0}
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            places = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        else:
            continue
        stays: dict[str, tuple[int, ...] | None] = {}
        for name, place in places.items():
            if getattr(module, name, None) is not None:
                full = next((prefix + name for prefix in names[id(module)] if prefix + name in cuts), None)
                stays[name] = None if full is None else cuts[full].get(place)
        if len(set(stays.values())) > 1:
            raise PlanError(
                repr(path),
                law="all tensors of a layer keep the same output channels",
                got=", ".join(f"{name}: {'all' if kept is None else len(kept)}" for name, kept in stays.items()),
                cure="make the plan again",
            )


def check_attributes(model: nn.Module, attributes: Attributes) -> None:
    """Refuse numbers that no module keeps.

    Raises:
        PlanError: Naming the attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, own in attributes.items():
        for name in own:
            if path not in modules or type(vars(modules[path]).get(name)) is not int:
                raise PlanError(
                    f"{path}.{name}",
                    law="a whole number that a module of the model keeps",
                    got="no such attribute" if path in modules else f"no module {path!r}",
                    cure="make the plan again",
                )


def install_shells(model: nn.Module, plan: Plan, fill: Fill | None = None) -> nn.Module:
    """Cut the channels that go, and replace every decided layer by its shell, under all paths of the module.

    Args:
        model: Changed in place.
        plan: Checked against the model with `check_plan` before.
        fill: Called with (decision, old layer, shell) before the shell goes in; None leaves it uninitialised.

    Returns:
        The root, which is a new module where the model itself is the layer.
    """
    narrow_(model, plan.cuts, plan.attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced: dict[int, nn.Module] = {}
    for decision in plan.changes:
        layer = modules[decision.site]
        adapter = adapter_for(layer)
        if adapter is None or decision.method is None or decision.rank is None:
            raise TypeError(f"{decision.site} was not checked")
        weight = adapter.canonical(layer)
        shell = build_shell(
            adapter.geometry(layer), decision.method.form, decision.rank, device=weight.device, dtype=weight.dtype
        )
        if fill is not None:
            fill(decision, layer, shell)
        train_as_(shell, layer)
        replaced[id(layer)] = shell.train(layer.training)
    return swap(model, replaced)


def train_as_(new: nn.Module, old: nn.Module) -> None:
    """Give a module `requires_grad` of the layer whose place it takes: its biases as the bias, all else as the weight.

    Args:
        new: A shell, or a layer like the old one; changed.
        old: The layer, which has a weight.
    """
    for name, parameter in new.named_parameters():
        own = getattr(old, "bias", None) if name.rpartition(".")[2] == "bias" else None
        own = own if isinstance(own, torch.Tensor) else tensor(old, "weight")
        parameter.requires_grad_(own.requires_grad)


def swap(model: nn.Module, replaced: dict[int, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, found by identity, under every name they have."""
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    return model


def take_over(model: nn.Module, changed: nn.Module, plan: Plan) -> nn.Module:
    """Make a model what a changed copy of it is, in place.

    Args:
        model: The original. Parameters that the plan neither cuts nor replaces are the same objects afterwards.
        changed: The copy, after the plan was carried out.
        plan: The plan.

    Returns:
        The root, which is a new module where the model itself is a replaced layer.
    """
    new = dict(changed.named_modules(remove_duplicate=False))
    replaced = {}
    with undone_on_failure(model) as values:
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if any(decision.site == path for decision in plan.changes):
                replaced[id(module)] = new[path]
            elif path in new and type(new[path]) is type(module):
                _take_tensors(module, new[path], values)
        narrow_(model, {name: {} for name in plan.cuts}, plan.attributes)  # the tensors are narrow; the numbers follow
        return swap(model, replaced)


def _take_tensors(module: nn.Module, new: nn.Module, before: list[tuple[Tensor, Tensor]]) -> None:
    """A module's own tensors become those of another: by value where the shape is the same, else the tensor itself.

    Args:
        module: What is changed.
        new: Holds the tensors.
        before: Gets each tensor that is written into, with a copy of what it held.
    """
    registers: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (module._parameters, new._parameters),
        (module._buffers, new._buffers),
    ]
    with torch.no_grad():
        for old, own in registers:
            for name, value in old.items():
                if value is None or own[name] is None or own[name].shape != value.shape:
                    old[name] = own[name]
                elif not torch.equal(value, own[name]):
                    before.append((value, value.clone()))
                    value.copy_(own[name])


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Leave a model as it was if what is done to it in here fails or is stopped by Ctrl-C.

    Yields:
        A list for what is written into: each tensor, with a copy of what it held. Modules, their registers and
        attributes are remembered here.
    """
    own = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), [(getattr(m, name), dict(getattr(m, name))) for name in own]) for m in model.modules()]
    values: list[tuple[Tensor, Tensor]] = []
    try:
        yield values
    except BaseException:
        for module, attributes, registers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for register, held in registers:
                register.clear()
                register.update(held)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def filler(stats: Statistics | None) -> Fill:
    """The closed-form fill without repair, see `unrepaired`."""

    def fill(decision: Decision, layer: nn.Module, shell: nn.Sequential) -> None:
        factors, bias = unrepaired(decision, layer, stats)
        own = getattr(layer, "bias", None)
        fill_shell(shell, factors, None if bias is None or own is None else bias.to(own.dtype))

    return fill


def unrepaired(decision: Decision, layer: nn.Module, stats: Statistics | None) -> tuple[list[Factors], Tensor | None]:
    """A layer's factors and bias without repair: each group decomposed; a bias absorbs the change of the mean output.

    With `D = W − LR` and mean input `x̄`, the bias becomes `b + D x̄`, so the mean output is the original's.

    Args:
        decision: What becomes of the layer.
        layer: The original, or narrowed, layer.
        stats: Of the model; None where the method reads none.

    Returns:
        One `Factors` a group, none for a layer that stays dense; and the bias in the work dtype, None without one.
    """
    adapter = adapter_for(layer)
    if adapter is None:
        raise TypeError(f"{decision.site} was not checked")
    geometry = adapter.geometry(layer)
    site = Site(decision.site, (), adapter.kind, geometry, (), 1)
    bias = adapter.bias(layer)
    wide = None if bias is None else widen(bias)
    factors: list[Factors] = []
    shifts: list[Tensor] = []
    if decision.method is None or decision.rank is None:
        return factors, wide
    for group, own in enumerate(widen(adapter.canonical(layer))):
        moments = moments_of(site, group, decision.method, stats)
        factors.append(factorise(decision.method, own, decision.rank, moments))
        if wide is not None and decision.method.needs and moments.mean is not None:
            shifts.append((own - factors[-1].reconstruct()).flatten(1) @ moments.mean.to(own))
    if wide is not None and shifts:
        wide = wide + torch.cat(shifts)
    return factors, wide


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ModelError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as cause:
        raise ModelError(
            type(model).__name__,
            law="the model can be copied, since the original is left untouched",
            got=str(cause),
            cure="use rankfold.apply_, which changes the model in place",
        ) from cause


def check_copy(model: nn.Module, example: Batch) -> None:
    """Refuse a model whose copy is not a model of its own.

    A function that the model keeps (a lambda, a bound method) is not copied: it goes on calling the original's layers,
    and a layer that was replaced in the copy would never run.

    Raises:
        ModelError: The copy has other weights, or calls a layer of the original.
    """
    copy_of = copied(model)
    ours, theirs = model.state_dict(), copy_of.state_dict()
    differing = next((name for name in {**ours, **theirs} if not _equal(ours.get(name), theirs.get(name))), None)
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: called.append(path))
        for path, module in model.named_modules()
    ]
    try:
        if differing is None:
            run_one(copy_of, example)
    finally:
        for handle in handles:
            handle.remove()
    if differing is not None or called:
        raise ModelError(
            type(model).__name__,
            law="a deep copy has the same weights and calls its own layers",
            got=f"another {differing!r}" if called == [] else f"a copy that calls {called[0]!r} of the original",
            cure="write what the model keeps in a lambda or bound method as a method, or use rankfold.apply_",
        )


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two entries of state dicts hold the same bytes, where they have bytes of their own."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return type(ours) is type(theirs)
    if is_lazy(ours) or ours.layout is not torch.strided or type(ours.data) is not Tensor or ours.is_quantized:
        return True
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    mine, other = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (ours, theirs))
    return torch.equal(mine, other)


def merge(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Multiply every shell back into one dense layer: the inverse of `apply`, up to the rank lost.

    Args:
        model: A compressed model.
        plan: The plan it was made by.
        inplace: Change the model itself.

    Returns:
        A model of the original's structure (transformers' `Conv1D` comes back as `nn.Linear`); layers that lost
        channels stay narrow.

    Raises:
        ModelError: The model is no module, or is to be changed in place and is compiled.
        PlanError: The model is not what the plan makes.
    """
    if inplace:
        check_in_place(model, instead="rankfold.merge with inplace=False")
    model = check_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for decision in plan.changes:
        shell = modules.get(decision.site)
        if not _is_shell(shell, decision):
            raise PlanError(
                repr(decision.site),
                law="a shell that the plan made",
                got=type(shell).__name__,
                cure="pass the compressed model with its own plan",
            )
    model = model if inplace else copied(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced: dict[int, nn.Module] = {}
    for decision in plan.changes:
        shell = modules[decision.site]
        parts = [adapter for layer in shell.children() if (adapter := adapter_for(layer)) is not None]
        geometries = [part.geometry(layer) for part, layer in zip(parts, shell.children(), strict=True)]
        replaced[id(shell)] = _dense(list(shell.children()), geometries)
    return swap(model, replaced)


def _is_shell(module: nn.Module | None, decision: Decision) -> bool:
    """Whether a module is built as the decision's form and rank say."""
    if not isinstance(module, nn.Sequential) or not len(module) or decision.method is None or decision.rank is None:
        return False
    adapters = [adapter_for(layer) for layer in module]
    parts = [part.geometry(layer) for part, layer in zip(adapters, module, strict=True) if part is not None]
    if len(parts) != len(adapters):
        return False
    try:
        return list(stages(dense_geometry(parts), decision.method.form, decision.rank)) == parts
    except PlanError:
        return False


def _dense(layers: list[nn.Module], geometries: list[Geometry]) -> nn.Module:
    geometry = dense_geometry(geometries)
    weights = [torch.unflatten(widen(tensor(layer, "weight")), 0, (geometry.groups, -1)) for layer in layers]
    product = weights[0]
    for weight in weights[1:]:
        product = torch.einsum("gor...,gri...->goi...", weight, product)
    first = tensor(layers[0], "weight")
    dense = geometry.build(device=first.device, dtype=first.dtype)
    with torch.no_grad():
        tensor(dense, "weight").copy_(product.flatten(0, 1))
        if geometry.bias:
            tensor(dense, "bias").copy_(tensor(layers[-1], "bias"))
    train_as_(dense, layers[0])
    if geometry.bias:
        tensor(dense, "bias").requires_grad_(tensor(layers[-1], "bias").requires_grad)
    return dense.train(layers[0].training)

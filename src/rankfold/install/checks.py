"""Plan + model → an error that names what does not fit, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankfold.branches.installing import below
from rankfold.channels.narrowing import Attributes, Cuts, kept_of, narrowed_geometry
from rankfold.errors import PlanError, near_matches, shown
from rankfold.layers import adapter_for, places_of, serves
from rankfold.layers.attention import SplitAttention
from rankfold.layers.splitting import attentions, split_, split_at
from rankfold.layers.stands import CONSTANT
from rankfold.layers.tied import heads_of
from rankfold.plan import Plan
from rankfold.sites.finding import fingerprint


def split_by(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """A model with its attention split as a plan asks for: what the plan is checked against and carried out on.

    Args:
        model: The original.
        plan: The plan.
        inplace: True to split in the model itself.

    Returns:
        A copy that shares all other tensors with the model; the very same object where nothing is left to split.

    Raises:
        PlanError: `plan` is no plan, or splits what is no `nn.MultiheadAttention`, or one that has to stay whole.
    """
    _check_kind(plan)
    if not plan.split:
        return model
    result = (split_ if inplace else split_at)(model, plan.split)
    modules, whole = dict(result.named_modules(remove_duplicate=False)), attentions(result)
    for path in plan.split:
        if not isinstance(modules.get(path), SplitAttention):
            raise PlanError(
                repr(path),
                law="every attention that the plan splits is an nn.MultiheadAttention that can be split",
                got=whole.get(path) or (type(modules[path]).__name__ if path in modules else "no such module"),
                cure="make a plan for this model",
            )
    return result


def _check_kind(plan: object) -> None:
    """Refuse what is no plan."""
    if not isinstance(plan, Plan):
        raise PlanError(
            "plan", law="a rankfold.Plan", got=shown(plan), cure="pass the plan, or Plan.from_json(text) of its file"
        )


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check a plan against a model before anything is changed.

    Args:
        model: The model, with its attention split as the plan asks for (`split_by`).
        plan: The plan.

    Raises:
        PlanError: The plan is of another model, names a module that is not there or no layer of a known kind, decides
            twice on a module with two names, or asks for a rank the layer cannot have.
    """
    _check_kind(plan)
    if plan.fingerprint != fingerprint(model):
        raise PlanError(
            plan.model or "plan",
            law="the plan is of a model with the same parameter names, shapes and dtypes",
            got=f"fingerprint {plan.fingerprint[:12]} against {fingerprint(model)[:12]} of this {type(model).__name__}",
            cure="make a plan for this model",
        )
    check_branches(model, plan)
    check_channels(model, plan)
    added = {
        f"{path}.bias": torch.empty(stand.channels, device="meta")
        for path, stand in plan.stands.items()
        if stand.kind == CONSTANT
    }
    check_cuts(model, plan.cuts, added)
    check_attributes(model, plan.attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
    tables = {head: table for table, head in heads_of(model).items()}
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
        if (table := tables.get(decision.site)) is not None:
            raise PlanError(
                repr(decision.site),
                law="a layer with a weight of its own",
                got=f"the head of the table {table!r}, whose decision is for both",
                cure=f"decide on {table!r}",
            )
        kept = kept_of(decision.site, module, plan.cuts)
        geometry = narrowed_geometry(adapter.geometry(module), kept)
        shape = geometry.canonical_shape
        why = decision.method.refuses(shape)
        if why is None and not serves(decision.method.form, geometry):
            why = f"a layer that the {decision.method.form} form can replace"
        if why is None and (decision.rank is None or not decision.method.admits(shape, decision.rank)):
            ranks = decision.method.ranks(shape)
            why = f"a rank between {ranks[0]} and {ranks[-1]}"
        if why is not None:
            raise PlanError(
                repr(decision.site),
                law=why,
                got=f"{decision.method} at rank {shown(decision.rank)}",
                cure="correct the plan",
            )


def check_branches(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose stands are of no module, stand in one another, or do not agree with its decisions.

    Raises:
        PlanError: They do not fit; the module, branch or site is named.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    cure = "make the plan again"
    for path in plan.stands:
        if not path or path not in modules:
            near = near_matches(path, modules)
            raise PlanError(repr(path), law="a module that goes with a branch", got="no such module", cure=near)
        if below(path, (other for other in plan.stands if other != path)):
            raise PlanError(repr(path), law="what goes goes once", got="a stand for a module around it", cure=cure)
    if len({decision.branch for decision in plan.branches}) < len(plan.branches):
        raise PlanError("branches", law="a branch goes once", got="one that is named twice", cure=cure)
    constants = {path for path, stand in plan.stands.items() if stand.kind == CONSTANT}
    named = [decision.constant for decision in plan.branches if decision.constant]
    if constants != set(named) or len(named) != len(constants):
        raise PlanError(
            "branches",
            law="each constant is what is left of one branch",
            got=f"constants at {shown(sorted(constants))} for branches that name {shown(sorted(named))}",
            cure=cure,
        )
    for decision in plan.decisions:
        if decision.gone != below(decision.site, plan.stands):
            got = "rank 0 without one" if decision.gone else "another decision"
            law = "a layer has rank 0 where it, or a module around it, goes with a branch, and only there"
            raise PlanError(repr(decision.site), law=law, got=got, cure=cure)
    if plan.branches and plan.repair is None:
        raise PlanError(
            "repair",
            law="what a removed branch did is taken up by the layers after it, in a repair",
            got="none",
            cure='set "repair" to {"name": "lockstep"}, or make the plan again without branches',
        )


def check_channels(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that removes channels of a group that the model does not have, or removes channels without cuts.

    Raises:
        PlanError: It does; the group, or the missing cuts, are named.
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
            law="where channels go, cuts list what stays of every tensor",
            got=f"{len(plan.channels)} groups that lose channels and no cuts",
            cure="take the channels out of the plan, too, or make the plan again",
        )


def check_cuts(model: nn.Module, cuts: Cuts, added: Mapping[str, Tensor] | None = None) -> None:
    """Refuse cuts that do not fit a model.

    Args:
        model: The original.
        cuts: Indices that stay, by tensor and axis.
        added: Tensors that it has after branches went, by name.

    Raises:
        PlanError: They do not fit; the tensor is named.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **(added or {}),
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
    names: dict[int, list[str]] = {}  # prefixes of a module that stands in several places
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(f"{path}." if path else "")
    for path, module in model.named_modules():
        stays: dict[str, tuple[int, ...] | None] = {}
        for name, place in places_of(module).items():
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
    """Refuse new values of attributes that no module of the model has as whole numbers.

    Raises:
        PlanError: There is no such attribute; it is named.
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

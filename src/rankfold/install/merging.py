"""Shells → dense layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rankfold.errors import PlanError
from rankfold.install.swap import train_as_
from rankfold.layers import Geometry, adapter_for, chain_of, dense_geometry, stage_weight, stages, swap, tensor
from rankfold.layers.splitting import join_
from rankfold.linalg.precision import widen
from rankfold.plan import Decision, Plan
from rankfold.sites.copies import copied
from rankfold.sites.models import check_in_place, check_module

Chain: TypeAlias = list[tuple[Tensor, Geometry, Tensor | None]]  # weight by group, geometry and bias of each layer


def merge(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Multiply every shell back into one dense layer: the inverse of `apply`, up to the rank lost.

    Args:
        model: A compressed model.
        plan: The plan that it was compressed by.
        inplace: True to change the model itself.

    Returns:
        A model of the original's structure (transformers' `Conv1D` comes back as `nn.Linear`); layers that lost
        channels stay narrow, attention that lost heads stays split, and a table and its head, whose maps differ, are
        two layers with weights of their own.

    Raises:
        ModelError: The model is no module, or is to be changed in place and is compiled.
        PlanError: The model does not have the shells that the plan makes.
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
        chain = chain_of(shell)
        if chain is None:
            raise TypeError(f"{decision.site} was not checked")
        replaced[id(shell)] = dense_of(shell, chain)
        head = _head_of(model, shell)
        if head is not None and (own := chain_of(head)) is not None:
            replaced[id(head)] = dense_of(head, own)
    return join_(swap(model, replaced), plan.split)


def _head_of(model: nn.Module, shell: nn.Module) -> nn.Module | None:
    """The replacement of a head that multiplies with the table of a shell; None where there is none."""
    first = next((child for child in shell.children() if isinstance(child, nn.Embedding)), None)
    if first is None:
        return None
    for module in model.modules():
        last = list(module.children())[-1:] if isinstance(module, nn.Sequential) and module is not shell else []
        if last and getattr(last[0], "weight", None) is first.weight:
            return module
    return None


def _is_shell(module: nn.Module | None, decision: Decision) -> bool:
    """Whether a module has the structure that follows from the decision's form and rank."""
    if module is None or decision.method is None or decision.rank is None:
        return False
    chain = chain_of(module)
    layers = list(module.children())
    adapters = [adapter_for(layer) for layer in layers]
    parts = [part.geometry(layer) for part, layer in zip(adapters, layers, strict=True) if part is not None]
    if chain is None or len(parts) != len(layers):
        return False
    geometry = dense_geometry([part for _, part, _ in chain])
    try:
        expected = stages(geometry, decision.method.form, decision.rank)
        return [replace(part, repeats=1) for part in expected] == parts  # a built layer does not know its repeats
    except PlanError:
        return False


def dense_of(shell: nn.Module, chain: Chain) -> nn.Module:
    """The dense layer that a shell's layers multiply out to."""
    geometry, bias = dense_geometry([part for _, part, _ in chain]), chain[-1][2]
    weights = [_dense_stage(weight, part, geometry.groups) for weight, part, _ in chain]
    product = weights[0]
    for weight in weights[1:]:
        product = torch.einsum("gor...,gri...->goi...", weight, product)
    layers = list(shell.children())
    first = tensor(layers[0], "weight")
    dense = geometry.build(device=first.device, dtype=first.dtype)
    with torch.no_grad():
        stage_weight(dense).copy_(product)
        if bias is not None:
            tensor(dense, "bias").copy_(bias)
    train_as_(dense, layers[0])
    if bias is not None:
        tensor(dense, "bias").requires_grad_(tensor(layers[-1], "bias").requires_grad)
    return dense.train(layers[0].training)


def _dense_stage(weight: Tensor, part: Geometry, groups: int) -> Tensor:
    """A stage's weight by group of the layer, groups × out × in × kernel…; its further groups lie on a diagonal."""
    own = part.groups // groups
    split = torch.unflatten(widen(weight), 0, (groups, own))
    if own == 1:
        return split[:, 0]
    dense = split.new_zeros(groups, own, split.shape[2], own, *split.shape[3:])
    for index in range(own):
        dense[:, index, :, index] = split[:, index]
    return dense.flatten(3, 4).flatten(1, 2)

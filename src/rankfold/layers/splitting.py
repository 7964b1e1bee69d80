"""`nn.MultiheadAttention` split into linear layers wherever it stands in a model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rankfold.errors import ModelError
from rankfold.layers.attention import SplitAttention, packed
from rankfold.layers.swapping import swap
from rankfold.layers.transformer import SplitDecoder, SplitEncoder, take_over

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
AROUND = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TOWERS = {nn.TransformerEncoder: SplitEncoder, nn.TransformerDecoder: SplitDecoder}
APPENDS = "unsupported: it appends keys or values of its own (add_bias_kv, add_zero_attn)"


def split_attention(model: nn.Module) -> nn.Module:
    """A copy of a model in which every `nn.MultiheadAttention` is a `SplitAttention` of the same weights.

    `nn.MultiheadAttention` holds its projections as bare parameters, and the size of its heads follows from the size
    of its inputs: none of its layers can be compressed, and no head can be removed. The copy computes the same and can
    be compressed. `compress` and everything else that takes a model does this by itself, and tries first whether the
    model computes the same; this is for looking at the copy, or training it.

    Attention is left as it is where a hook, a parametrisation or another module holds on to it, and in a subclass that
    may compute something else. `nn.TransformerEncoder` and `nn.TransformerDecoder` around split attention become
    subclasses that call their layers one after another.

    Args:
        model: Model, left untouched.

    Raises:
        ModelError: `model` is no module, or an attention appends keys or values of its own.
    """
    if not isinstance(model, nn.Module):
        raise ModelError("model", law="an nn.Module", got=type(model).__name__, cure="pass the module itself")
    found = attentions(model)
    if (path := next((path for path, why in found.items() if why == APPENDS), None)) is not None:
        SplitAttention(model.get_submodule(path))  # type: ignore[arg-type] # raises
    return split_(copy.deepcopy(model), [path for path, why in found.items() if why is None])


def split_at(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """The model with the attention at some paths split: a copy that shares all other tensors with it.

    Args:
        model: Model, left untouched.
        paths: Paths of `nn.MultiheadAttention`.

    Returns:
        The very same model where nothing is left to split, as `split_` sees it.
    """
    if not _to_split(model, paths):
        return model
    return split_(_sharing_copy(model), paths)


def split_(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """Split the attention at some paths in place.

    Args:
        model: Model, changed.
        paths: Paths of `nn.MultiheadAttention`. One that is split already, or that is none, or must stay whole, is left
            as it is: what follows checks the structure.

    Returns:
        The root, which is a new module where the model itself is the attention.
    """
    found = _to_split(model, paths)
    if not found:
        return model
    model = swap(model, {id(module): SplitAttention(module) for module in found})
    towers = {}
    for tower in model.modules():
        done = not isinstance(tower, tuple(TOWERS)) or isinstance(tower, tuple(TOWERS.values()))
        if done or not any(isinstance(part, SplitAttention) for part in tower.modules()):
            continue
        kind = TOWERS.get(type(tower))
        if kind is not None:
            towers[id(tower)] = kind(tower)
        elif hasattr(tower, "use_nested_tensor"):
            vars(tower)["use_nested_tensor"] = False  # a subclass: split attention takes no nested tensor
    return swap(model, towers)


def join_(model: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Put `nn.MultiheadAttention` back in the place of split attention in which nothing became smaller, in place.

    Args:
        model: Model, changed.
        paths: Paths of split attention; None is all.

    Returns:
        The root, which is a new module where the model itself is the attention.
    """
    found = {
        id(module): whole
        for path, module in model.named_modules()
        if isinstance(module, SplitAttention) and (paths is None or path in paths) and (whole := packed(module))
    }
    model = swap(model, found)
    towers = {}
    for tower in model.modules():
        plain = next((plain for plain, kind in TOWERS.items() if type(tower) is kind), None)
        if plain is not None and not any(isinstance(part, SplitAttention) for part in tower.modules()):
            towers[id(tower)] = take_over(object.__new__(plain), tower)
    return swap(model, towers) if found else model


def joined(model: nn.Module) -> nn.Module:
    """`join_` on a copy that shares all other tensors with the model; the model itself where no attention is split."""
    if not any(isinstance(module, SplitAttention) for module in model.modules()):
        return model
    return join_(_sharing_copy(model))


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model around the same tensors.

    Raises:
        ModelError: The model cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    except (RuntimeError, TypeError) as cause:
        raise ModelError(
            type(model).__name__,
            law="the model can be copied, since its attention is split in a copy",
            got=str(cause),
            cure="use rankfold.split_attention where the model is built, or rankfold.apply_",
        ) from cause


def _to_split(model: nn.Module, paths: Collection[str]) -> list[nn.MultiheadAttention]:
    """The attention at some paths that is not split yet, and can be."""
    if not paths:
        return []
    wanted, free = set(paths), attentions(model)
    modules = dict(model.named_modules())
    return [modules[path] for path, why in free.items() if why is None and path in wanted]


def attentions(model: nn.Module) -> dict[str, str | None]:
    """Every `nn.MultiheadAttention` of a model by its first path, with the reason why it must stay whole.

    Args:
        model: The model.

    Returns:
        Reasons that read *kind: explanation*; None where nothing is against a split.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not found:
        return {}
    owners: dict[int, set[int]] = {}  # identities of modules, by the address of a tensor that they hold
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                owners.setdefault(_address(tensor), set()).add(id(module))
    around = {
        id(child): parent
        for parent in model.modules()
        for child in parent.children()
        if isinstance(parent, AROUND) and _has_own_forward(parent)
    }
    return {path: _why_whole(module, owners, around.get(id(module))) for path, module in found.items()}


def _why_whole(module: nn.MultiheadAttention, owners: dict[int, set[int]], around: nn.Module | None) -> str | None:
    """Reason why an attention must stay whole."""
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        return "parametrised: a weight is computed from other tensors (remove the parametrisation first)"
    if type(module) is not nn.MultiheadAttention:
        return f"unsupported: {type(module).__name__} may compute something else than nn.MultiheadAttention"
    if "forward" in vars(module):
        return "overridden: it has been given a forward of its own"
    if any(getattr(part, name) for part in (module, module.out_proj) for name in HOOKS):
        return "hooked: it has hooks, which would be lost with it"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return APPENDS
    own = {id(module), id(module.out_proj)}
    for name, tensor in _tensors(module):
        if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor or not tensor.is_floating_point():
            return f"quantised or sharded: its {name} is no plain tensor of floats"
        if tensor.layout is not torch.strided:
            return f"unsupported: its {name} is of {tensor.layout}"
        if owners[_address(tensor)] - own:
            return f"tied: its {name} is also held by another module"
    if around is not None:
        return f"read elsewhere: {type(around).__name__} has a forward of its own, which may read its parameters"
    return None


def _tensors(module: nn.MultiheadAttention) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module is an encoder or decoder layer that computes in its own way."""
    kind = type(module)
    return "forward" in vars(module) or not any(kind.forward is each.forward for each in AROUND)


def _address(tensor: Tensor) -> int:
    """Address at which a tensor's memory starts; its identity where it has no memory of its own."""
    plain = not is_lazy(tensor) and type(tensor.data) is Tensor and tensor.layout is torch.strided
    return (tensor.data_ptr() if plain else 0) or -id(tensor)

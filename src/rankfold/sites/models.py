"""Checks of models: which are accepted, and which module is compressed where one was compiled."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError

# Namespaces of torch's own objects that hold weights in a layout of some kernel, out of reach of `parameters()`.
PACKED = ("quantized", "rnn", "sparse", "xnnpack", "mkldnn")
COMPILED = "the model was compiled and what comes back is not: for that, torch.compile(out.model)"


def check_module(model: nn.Module, place: str = "model") -> nn.Module:
    """Refuse what is no module, or has tensors on meta.

    Args:
        model: Object that was given as a model.
        place: Name of the argument, for the message where it is no module.

    Returns:
        The model itself, or the plain one inside what `torch.compile` returned.

    Raises:
        ModelError: The model is no module with Python code, or has a tensor on meta, which is named.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(place, law="an nn.Module", got=type(model).__name__, cure="pass the module itself")
    model = uncompiled(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            place,
            law="an nn.Module with its Python code",
            got=type(model).__name__,
            cure="pass the module that was scripted or traced, and script what comes back",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(
                name,
                law="every tensor is on a real device",
                got="a tensor on meta",
                cure="load the weights on a device first (model.to_empty holds no weights)",
            )
    return model


def check_model(model: nn.Module) -> nn.Module:
    """Refuse what is no module, has tensors on meta or packed away, compiled parts, or weights that are not finite.

    Returns:
        The model itself, or the plain one inside what `torch.compile` returned.

    Raises:
        ModelError: The model is one of these; the tensor or the layers are named.
    """
    model = check_module(model)
    _check_parts(model)
    _check_packed(model)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ModelError(
                f"{path}.weight" if path else "weight",
                law="a forward leaves every parameter as it is",
                got=f"max_norm={module.max_norm}, by which it rescales the rows that it reads",
                cure="set max_norm to None; a trained table keeps its rows",
            )
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
        if not plain or not parameter.is_floating_point() or parameter.layout is not torch.strided:
            continue
        # isfinite is not defined for 8-bit floats
        weight = parameter.detach()
        finite = torch.isfinite(weight.float() if weight.element_size() == 1 else weight)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ModelError(
                name,
                law="every weight is finite",
                got=f"{bad} of {parameter.numel()} NaN or infinite",
                cure="look at how the model was trained or loaded",
            )
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether calling a model runs compiled code: it is what `torch.compile` returned, or `model.compile()` was called
    on it or on a module inside.
    """
    return _is_wrapper(model) or any(module._compiled_call_impl is not None for module in model.modules())


def check_in_place(model: nn.Module, *, instead: str) -> None:
    """Refuse to change a compiled model: its code may hold on to the modules that are replaced.

    Args:
        model: Model that would be changed.
        instead: The call that changes a copy, for the cure.

    Raises:
        ModelError: The model is compiled.
    """
    if isinstance(model, nn.Module) and is_compiled(model):
        raise ModelError(
            "model",
            law="what is changed in place is not compiled",
            got=f"a compiled {type(uncompiled(model)).__name__}",
            cure=f"use {instead}, which takes the plain model inside, and compile what it returns",
        )


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned. Nothing was compiled where its code is not even loaded."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def uncompiled(model: nn.Module) -> nn.Module:
    """The plain model inside what `torch.compile` returned; any other model itself."""
    while _is_wrapper(model):
        model = model.get_submodule("_orig_mod")
    return model


def _check_parts(model: nn.Module) -> None:
    """Refuse modules inside a model that `torch.compile` returned: their paths are not those of the plain model."""
    parts = [path for path, module in model.named_modules() if path and _is_wrapper(module)]
    if parts:
        raise ModelError(
            parts[0],
            law="no module inside the model is compiled by itself",
            got=f"{len(parts)} that torch.compile returned",
            cure="put the plain module back, which is its _orig_mod, and compile the parts of what comes back",
        )


def _check_packed(model: nn.Module) -> None:
    """Refuse weights that no count of parameters, bytes or MACs sees."""
    packed: dict[str, None] = {}
    for path, module in model.named_modules():
        if _is_packed(module):
            packed[_owner(model, path)] = None
    if packed:
        first, *_ = names = [path or "(the model)" for path in packed]
        raise ModelError(
            first,
            law="every weight is a tensor that can be counted",
            got=f"the packed weights of {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5)),
            cure="compress the float model, and quantise what comes back",
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether a module keeps a weight in an object of some kernel."""
    held = [value for value in vars(module).values() if isinstance(value, torch.ScriptObject)]
    names = [value._type().qualified_name() for value in held]
    return any(f".classes.{namespace}." in name for name in names for namespace in PACKED)


def _owner(model: nn.Module, path: str) -> str:
    """The layer that a holder of packed weights belongs to: the outermost module of torch's quantisation above it."""
    names = path.split(".") if path else []
    for depth in range(len(names) + 1):
        above = ".".join(names[:depth])
        if type(model.get_submodule(above)).__module__.startswith("torch.ao."):
            return above
    return path

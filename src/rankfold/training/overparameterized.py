"""Layers as several with nothing in between, for training, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.decompositions.tensors import refuses_tensor
from rankfold.errors import SiteError
from rankfold.factors import Factors, MatrixFactors, TuckerFactors
from rankfold.install.merging import dense_of
from rankfold.layers import Adapter, Geometry, chain_of, swap
from rankfold.linalg.modes import times, unfolded
from rankfold.linalg.precision import widen
from rankfold.linalg.svd import svd
from rankfold.linalg.whitening import symmetric_eigen
from rankfold.training.choosing import chosen_layers, factored_layers, target_of
from rankfold.training.forms import Overparameterized
from rankfold.training.optimizers import replace_parameters


def overparameterize(
    model: nn.Module,
    *,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    optimizer: Optimizer | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Write every layer as a product, with the same output up to rounding, so that training moves its factors.

    `W = C ×_out U_out ×_in U_in` with the full orthonormal bases of HOSVD: a convolution becomes `1×1 in → in`,
    `k×k in → out`, `1×1 out → out`; a layer without a kernel becomes `in → r → out` by its SVD, `r = min(in, out)`.
    Nothing stands in between, so `merge` multiplies them back exactly, whatever training made of them. Train with
    `Orthogonality`, which keeps the outer ones orthonormal: the ranks that `EVBMF` finds afterwards are then those of
    the core.

    Args:
        model: The model.
        only: Paths or patterns (`*`, `?`) of the layers; None is all that can be.
        exclude: Paths or patterns of layers to leave alone.
        optimizer: Optimizer of the model, changed with it: new weights are trained in the group of the old one, and
            what was known of that one is forgotten. Needs `inplace=True`.
        inplace: True to change the model itself.

    Returns:
        The model with an `Overparameterized` in place of each layer. A layer with a single channel on one side, such as
        a depthwise convolution, and a table, stay.

    Raises:
        OptionError: A selection is no list of strings, or an optimizer is given for a copy.
        SiteError: A pattern matches no layer, or no layer is left.

    References:
        He, Jiang, Wu, arXiv 2408.16289. We differ in the start, which is exact, and in layers without a kernel.
    """
    model = target_of(model, optimizer, inplace)
    chosen = chosen_layers(model, _fits, only=only, exclude=exclude, place="overparameterize")
    replaced: dict[int, nn.Module] = {}
    parameters: dict[Tensor, list[Tensor]] = {}
    for layer, adapter in chosen.values():
        new = _product(layer, adapter)
        replaced[id(layer)] = new
        weight = layer.weight
        if isinstance(weight, Tensor):
            parameters[weight] = [part.weight for part in new if isinstance(part.weight, Tensor)]
    model = swap(model, replaced)
    if optimizer is not None:
        replace_parameters(optimizer, parameters)
    return model


def merge(model: nn.Module, *, optimizer: Optimizer | None = None, inplace: bool = False) -> nn.Module:
    """Multiply every `Overparameterized` back into one layer: the same output up to rounding.

    Args:
        model: The model.
        optimizer: Optimizer of the model, changed with it; see `overparameterize`.
        inplace: True to change the model itself.

    Raises:
        OptionError: An optimizer is given for a copy.
        SiteError: There is nothing to merge.
    """
    model = target_of(model, optimizer, inplace)
    replaced: dict[int, nn.Module] = {}
    parameters: dict[Tensor, list[Tensor]] = {}
    for module in model.modules():
        chain = chain_of(module) if isinstance(module, Overparameterized) else None
        if chain is None:
            continue
        dense = replaced[id(module)] = dense_of(module, chain)
        first, *others = [part.weight for part in module.children() if isinstance(part.weight, Tensor)]
        parameters[first] = [dense.weight] if isinstance(dense.weight, Tensor) else []
        parameters |= {other: [] for other in others}
        last = list(module.children())[-1]
        if isinstance(last.bias, nn.Parameter):
            with torch.no_grad():
                last.bias.copy_(dense.bias)  # type: ignore[arg-type]
            dense.bias = last.bias  # the optimizer knows it
    if not replaced:
        raise SiteError("merge", law="a layer that overparameterize made", got="none", cure="pass the trained model")
    model = swap(model, replaced)
    if optimizer is not None:
        replace_parameters(optimizer, parameters)
    return model


def _fits(geometry: Geometry) -> bool:
    """Whether a layer is worth writing as a product."""
    return geometry.table is None and not geometry.tied and min(geometry.canonical_shape[:2]) > 1


def _product(layer: nn.Module, adapter: Adapter) -> Overparameterized:
    """The layers that multiply out to one; the bias is the layer's own parameter."""
    three = refuses_tensor(adapter.geometry(layer).canonical_shape, "tucker") is None
    groups = [_factors(own, three) for own in widen(adapter.canonical(layer).detach())]
    return Overparameterized(*factored_layers(layer, adapter, groups)).train(layer.training)


def _factors(weight: Tensor, three: bool) -> Factors:
    """A weight as the product of its bases and its core."""
    if not three:
        u, s, vh = svd(weight.flatten(1))
        ones = [1] * (weight.ndim - 2)
        return MatrixFactors(u.reshape(*u.shape, *ones), (s[:, None] * vh).reshape(len(s), *weight.shape[1:]))
    bases = []
    for mode in (0, 1):
        matrix = unfolded(weight, mode)
        bases.append(symmetric_eigen(matrix @ matrix.mT)[1].flip(-1))
    core = times(times(weight, bases[0].mT, 0), bases[1].mT, 1)
    ones = [1] * (weight.ndim - 2)
    return TuckerFactors(bases[0].reshape(*bases[0].shape, *ones), core, bases[1].mT.reshape(*bases[1].shape, *ones))

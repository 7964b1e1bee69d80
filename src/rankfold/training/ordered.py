"""Layers whose ranks are ordered by training: Maestro's ordered low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.checks import check_number
from rankfold.data.draws import check_seed
from rankfold.errors import NumericsError, OptionError, SiteError
from rankfold.factors import MatrixFactors
from rankfold.install.merging import dense_of
from rankfold.layers import Adapter, Geometry, adapter_for, chain_of, swap, tensor
from rankfold.linalg.precision import widen
from rankfold.linalg.svd import svd
from rankfold.training._base import Regularizer, unwrapped
from rankfold.training.choosing import chosen_layers, factored_layers, target_of
from rankfold.training.forms import Ordered
from rankfold.training.optimizers import check_cuttable, cut_parameters, replace_parameters

LEAST = 1e-7  # product of the norms of the factors behind a rank below which these are nothing


def ordered_layers(model: nn.Module) -> dict[str, Ordered]:
    """The ordered layers of a model by path.

    Raises:
        SiteError: There are none.
    """
    found = {path: each for path, each in unwrapped(model).named_modules() if isinstance(each, Ordered)}
    if not found:
        raise SiteError(
            type(unwrapped(model)).__name__,
            law="a model with ordered layers",
            got="none",
            cure="call rankfold.training.to_ordered first",
        )
    return found


def to_ordered(
    model: nn.Module,
    *,
    only: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
    optimizer: Optimizer | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Write every layer as two of full rank, `W = (U √Σ)(√Σ Vᵀ)`, with the same output up to rounding.

    Trained with an `OrderedSampler` and a `HierarchicalLasso`, the first ranks of every layer come to matter most, so
    that one network serves many sizes (`extract`). On a linear map with isotropic inputs the factors become its
    singular value decomposition, on an identity map the principal components of the inputs.

    Args:
        model: The model.
        only: Paths or patterns (`*`, `?`) of the layers; None is all that can be.
        exclude: Paths or patterns of layers to leave alone.
        ranks: Number of ranks by path, as `drop_ranks` returned it, for a model into which a checkpoint is loaded; what
            is not named has all.
        optimizer: Optimizer of the model, changed with it; see `overparameterize`.
        inplace: True to change the model itself.

    Returns:
        The model with an `Ordered` in place of each layer. Grouped and transposed convolutions, tables, and layers with
        a single channel on a side, stay.

    Raises:
        OptionError: A selection is no list of strings, or an optimizer is given for a copy.
        SiteError: A pattern matches no layer, or no layer is left.

    References:
        Horváth, Laskaridis, Rajput, Wang, ICML 2024 (Maestro).
    """
    model = target_of(model, optimizer, inplace)
    chosen = chosen_layers(model, _fits, only=only, exclude=exclude, place="to_ordered")
    replaced: dict[int, nn.Module] = {}
    parameters: dict[Tensor, list[Tensor]] = {}
    wanted = dict(ranks or {})
    for path, rank in wanted.items():
        most = min(tensor(chosen[path][0], "weight").flatten(1).shape) if path in chosen else 0
        if type(rank) is not int or not 1 <= rank <= most:
            raise OptionError(
                f"to_ordered.ranks at {path!r}",
                law=f"a rank from 1 to {most}" if most else "a layer that is replaced",
                got=repr(rank),
                cure="pass what drop_ranks returned for the same model",
            )
    for path, (layer, adapter) in chosen.items():
        new = _ordered(layer, adapter, wanted.get(path))
        replaced[id(layer)] = new
        parameters[tensor(layer, "weight")] = [tensor(new.first, "weight"), tensor(new.second, "weight")]
    model = swap(model, replaced)
    if optimizer is not None:
        replace_parameters(optimizer, parameters)
    return model


def _fits(geometry: Geometry) -> bool:
    plain = geometry.table is None and not geometry.tied and not geometry.transposed and geometry.groups == 1
    return plain and min(geometry.canonical_shape[:2]) > 1


def _ordered(layer: nn.Module, adapter: Adapter, rank: int | None) -> Ordered:
    """The two layers that are one, or its best of some rank; the bias is the layer's own parameter."""
    own = widen(adapter.canonical(layer).detach())[0]
    u, s, vh = svd(own.flatten(1))
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    root, ones = s.clamp_min(0).sqrt(), [1] * (own.ndim - 2)
    factors = MatrixFactors((u * root).reshape(*u.shape, *ones), (root[:, None] * vh).reshape(len(s), *own.shape[1:]))
    return Ordered(*factored_layers(layer, adapter, [factors])).train(layer.training)


def merge_ordered(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Multiply every `Ordered` back into one dense layer, of the ranks that it shows.

    Args:
        model: The model.
        inplace: True to change the model itself.

    Raises:
        SiteError: There is nothing to merge.
    """
    model = target_of(model, None, inplace)
    replaced: dict[int, nn.Module] = {}
    for module in ordered_layers(model).values():
        whole = nn.Sequential(module.first, module.second)
        chain = chain_of(whole)
        if chain is None:
            raise TypeError("an ordered layer consists of layers")
        width = module.rank if module.shown is None else module.shown
        (first, geometry, _), (second, last, bias) = chain
        cut = [(first[:, :width], geometry, None), (second[:, :, :width], last, bias)]
        replaced[id(module)] = dense_of(whole, cut)
    return swap(model, replaced)


class OrderedSampler:
    """One layer at one of its ranks for each batch, all others at all of theirs: every pair once a round.

    `sampler.step()` before the forward pass of each batch; it says nothing in eval mode. Pairs (layer, rank) are drawn
    without replacement by a seed, so all processes of a distributed run with one seed draw the same.

    Args:
        model: A model with ordered layers.
        seed: Seed of the draws.

    Raises:
        SiteError: The model has no ordered layers.

    References:
        Maestro, where wrong names of options left the sampler off unnoticed; here it is on once it is called.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        check_seed(seed)
        self._layers = ordered_layers(model)
        self._seed, self._round, self._place = seed, 0, 0
        self._order = self._drawn()

    def _drawn(self) -> list[tuple[str, int]]:
        """The pairs of this round in their order."""
        pairs = [(path, rank) for path, layer in self._layers.items() for rank in range(1, layer.rank + 1)]
        generator = torch.Generator().manual_seed(self._seed + self._round)
        return [pairs[index] for index in torch.randperm(len(pairs), generator=generator).tolist()]

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose ordered layers are not those of the sampler.

        Raises:
            OptionError: A layer of the sampler is not in the model.
        """
        own = {id(each) for each in unwrapped(model).modules()}
        for path, layer in self._layers.items():
            if id(layer) not in own:
                raise OptionError(
                    "OrderedSampler",
                    law="a sampler of the layers of the model that is trained",
                    got=f"one of another model's {path!r}",
                    cure="build it from the model, after its layers were replaced",
                )

    @property
    def pairs(self) -> int:
        """Number of steps of a round."""
        return len(self._order)

    def step(self) -> tuple[str, int]:
        """Set the ranks of the next batch.

        Returns:
            The path of the layer that is cut, and its rank.
        """
        while True:
            if self._place == len(self._order):
                self._round, self._place = self._round + 1, 0
                self._order = self._drawn()
            path, rank = self._order[self._place]
            self._place += 1
            if rank <= self._layers[path].rank:  # ranks may have been dropped since the round was drawn
                break
        for other, layer in self._layers.items():
            layer.sampled = rank if other == path else None
        return path, rank

    def rest(self) -> None:
        """Let every layer use all of its ranks again, as at the end of training."""
        for layer in self._layers.values():
            layer.sampled = None

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands in its round."""
        return {"seed": self._seed, "round": self._round, "place": self._place, "order": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` gave.

        Raises:
            OptionError: It is of a model with other layers.
        """
        order = [(str(path), int(rank)) for path, rank in state["order"]]
        if unknown := sorted({path for path, _ in order} - set(self._layers)):
            raise OptionError(
                "OrderedSampler",
                law="a state of a model with the same ordered layers",
                got=f"one that names {unknown[0]!r}",
                cure="load it into the sampler of the model that it was saved with",
            )
        self._seed, self._round, self._place = int(state["seed"]), int(state["round"]), int(state["place"])
        self._order = order


class HierarchicalLasso(Regularizer):
    """`Σ_b (‖U_{b:}‖_F + ‖V_{b:}‖_F)` of every ordered layer: groups lie in each other, so the last ranks go first.

    Args:
        weight: See `Regularizer`.
        share: See `Regularizer`.

    References:
        Maestro.
    """

    def __init__(self, weight: float | None = None, *, share: float | None = None) -> None:
        super().__init__(weight, share=share)

    def penalty(self, weight: Tensor) -> Tensor | None:
        """None: the penalty is on pairs of weights."""
        return None

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Regularizer.values`."""
        found = {}
        for path, layer in ordered_layers(model).items():
            with torch.autocast(tensor(layer.first, "weight").device.type, enabled=False):
                left, right = layer.tails()
                found[path] = left.float().sum() + right.float().sum()
        return found


@torch.no_grad()
def drop_ranks(model: nn.Module, *, least: float = LEAST, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Drop the last ranks of every ordered layer for good, where `‖U_{b:}‖·‖V_{b:}‖` is below a number.

    Args:
        model: A model with ordered layers, changed in place.
        least: The number.
        optimizer: Optimizer of the model, whose state is cut with the weights.

    Returns:
        The rank of each layer by path, at least 1.

    Raises:
        SiteError: The model has no ordered layers.
        OptionError: The number is none of at least 0, or the optimizer keeps a state that cannot be cut with a weight.
        NumericsError: A weight is NaN or infinite; nothing is changed.
    """
    check_number("drop_ranks.least", least, law="a number of at least 0", cure="leave it out")
    layers = ordered_layers(model)
    kept: dict[str, int] = {}
    if optimizer is not None:
        check_cuttable(optimizer)
    for path, layer in layers.items():
        left, right = layer.tails()
        if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise NumericsError(
                f"drop_ranks at {path!r}",
                law="every weight is finite",
                got="NaN or infinity",
                cure="go back to a checkpoint; the model has diverged",
            )
        kept[path] = max(1, int((left * right > least).sum()))
    for path, layer in layers.items():
        if kept[path] < layer.rank:
            for part, axis in ((layer.first, 0), (layer.second, 1)):
                old = tensor(part, "weight")
                new = nn.Parameter(old.detach().narrow(axis, 0, kept[path]).clone(), requires_grad=old.requires_grad)
                part.weight = new
                if optimizer is not None:
                    cut_parameters(optimizer, old, new, axis)
            _resize(layer)
    return kept


def _resize(layer: Ordered) -> None:
    """Numbers of channels that say what the weights are."""
    for part in (layer.first, layer.second):
        adapter = adapter_for(part)
        if adapter is not None:
            adapter.resize(part)


@contextmanager
def showing(model: nn.Module, ranks: Mapping[str, int]) -> Iterator[None]:
    """Context in which ordered layers use so many of their ranks, in any mode."""
    layers = ordered_layers(model)
    before = {path: layer.shown for path, layer in layers.items()}
    try:
        for path, rank in ranks.items():
            layers[path].shown = rank
        yield
    finally:
        for path, layer in layers.items():
            layer.shown = before[path]

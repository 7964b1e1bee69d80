"""Ranks found by training: every layer a mixture of candidate ranks, from a coarse grid to a fine one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankfold.checks import check_choice, check_count, check_flag, check_number
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.data.batches import Batch, labels_of, split_batch, to_device
from rankfold.data.running import device_of
from rankfold.data.splits import as_batches
from rankfold.decompositions import Decomposition
from rankfold.errors import DataError, NumericsError, OptionError, near_matches
from rankfold.layers import adapter_for, serves, tensor
from rankfold.layers.splitting import split_at
from rankfold.linalg.precision import widen
from rankfold.outputs.taken import output_tensor
from rankfold.plan import Decision, Plan
from rankfold.sites.finding import find_sites
from rankfold.sites.models import check_module
from rankfold.sites.site import Site, Sites
from rankfold.training.forms import eval_mode
from rankfold.training.mixture import Mixture, admitted

PRICES = ("rank", "params", "macs")
MOMENTUM = 0.9


@dataclass(frozen=True)
class Searched:
    """What `search` found.

    Attributes:
        plan: Plan of the chosen ranks, decomposed afresh when it is carried out; sites that cannot be are dense.
        ranks: The chosen rank of each site by path.
        history: For each round the candidates and the probability of each, by path.
    """

    plan: Plan
    ranks: Mapping[str, int]
    history: tuple[Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]], ...]


def search(
    model: nn.Module,
    data: Any,
    *,
    method: Decomposition,
    ranks: Sequence[int] | Mapping[str, Sequence[int]] = tuple(range(10, 101, 10)),
    factor: float = 10,
    warm_up: int = 20,
    steps: int = 100,
    gamma: float = 0.4,
    beta: float = 0.8,
    price: str = "rank",
    labels: bool = True,
    rate: float = 0.1,
    logit_rate: float = 1.0,
    clip: float = 1.0,
) -> Searched:
    """Choose the rank of every layer by gradient descent on a mixture of candidates.

    Each layer runs with `W_mix = Σ_r p_r Ŵ_r`, `p = softmax(α)` over its candidates. Steps alternate: the factors of
    all candidates lower `Σ‖W − W_mix‖_F² · L_r`, without data; then the logits α lower `L_val · L_r`, the
    cross-entropy on labelled batches. `L_r = γ Σ_i (Σ_r p_r r / max R_i)^β` is the price of the ranks. A round ends
    with the likeliest candidate r̄; the next one has the candidates `r̄ ± s/2` in steps of `s/f`, for steps of s before,
    until `s/f < 1`. The winner is decomposed afresh, since a round refines the mixture and not its parts.

    Args:
        model: A trained model; untouched.
        data: A re-iterable of batches with integer labels (not read without `labels`): an input is run in eval mode.
        method: Method of the factors that needs no data and has one number a site: `CP(whitened=False)`,
            `TensorTrain(separable=False, tied=True, whitened=False)`, `SVD()`.
        ranks: Candidates of the first round, evenly spaced, of every site or by path; what a site does not admit is
            left out of its own.
        factor: Factor f by which steps shrink from a round to the next.
        warm_up: Steps of the factors before each round.
        steps: Steps of a round.
        gamma: γ.
        beta: β.
        price: "rank", `r / max R_i`, as the authors have it, which is no number of parameters; "params" or "macs", the
            cost of the layer at r over that of the dense one.
        labels: False to lower the error of the weights in place of the cross-entropy: then no data is read but one
            batch for the shapes.
        rate: Learning rate of the factors.
        logit_rate: Learning rate of the logits.
        clip: Largest norm of a gradient.

    Raises:
        OptionError: An option is none of those named, or no site has candidates.
        DataError: Labels are asked for, and a batch has none.
        NumericsError: A loss is NaN or infinite: it is an error, and never a rank.

    References:
        Aghababaei-Harandi, Amini, arXiv 2409.03555. We differ in NaN, which there picks the smallest rank unnoticed, in
        prices of parameters and MACs, and in the fresh decomposition.
    """
    options = _Options(warm_up, steps, gamma, beta, labels, rate, logit_rate, clip)
    options.check()
    _check_method(method)
    law = "a number above 1"
    check_number("search.factor", factor, law=law, cure="try 10", low=1, open_low=True)
    check_choice("search.price", price, PRICES)
    batches = as_batches(data)
    sites = find_sites(model, next(iter(batches)))
    model = split_at(check_module(model), sites.split)
    modules = dict(model.named_modules())
    if isinstance(ranks, Mapping):
        for path in ranks:
            if path not in {site.path for site in sites}:
                raise OptionError(
                    "search.ranks",
                    law="paths of layers that can be compressed",
                    got=repr(path),
                    cure=near_matches(path, [site.path for site in sites]),
                )
    elif not isinstance(ranks, Sequence):
        raise OptionError("search.ranks", law="a list of ranks", got=repr(ranks)[:80], cure="try range(10, 101, 10)")
    own = {
        site.path: (site, widen(adapter.canonical(modules[site.path]).detach()))
        for site in sites
        if (adapter := adapter_for(modules[site.path])) is not None
        and site.geometry.table is None  # its map is the identity: there is no weight to put back
        and method.refuses(site.geometry.canonical_shape) is None
        and serves(method.form, site.geometry)
    }
    current = {path: _first(path, site, method, ranks) for path, (site, _) in own.items()}
    current = {path: candidates for path, candidates in current.items() if candidates}
    if not current:
        raise OptionError(
            "search.ranks", law="candidates that a site admits", got=repr(ranks)[:80], cure="name smaller ones"
        )
    spacing = {path: _spacing(candidates) for path, candidates in current.items()}
    history = []
    chosen: dict[str, int] = {}
    while True:
        layers = [
            Mixture(path, own[path][0], own[path][1], method, candidates, price) for path, candidates in current.items()
        ]
        with torch.enable_grad(), eval_mode(model):
            _round(model, modules, layers, batches, options)
        history.append({each.path: (each.ranks, tuple(each.probabilities().tolist())) for each in layers})
        chosen = {each.path: each.ranks[int(each.logits.argmax())] for each in layers}
        finer = {path: spacing[path] / factor for path in chosen}
        if all(step < 1 for step in finer.values()):
            break
        current = {}
        for path, best in chosen.items():
            grid = contracted(best, spacing[path], factor) if finer[path] >= 1 else (best,)
            current[path] = tuple(rank for rank in grid if admitted(own[path][0], method, rank) is not None) or (best,)
        spacing = finer
    return Searched(_plan(sites, method, own, chosen), chosen, tuple(history))


def contracted(best: int, step: float, factor: float) -> tuple[int, ...]:
    """Candidates of the next round: `best ± step/2` in steps of `step/factor`, whole numbers of at least 1."""
    fine, count = step / factor, round(factor / 2)
    grid = {round(best + fine * place) for place in range(-count, count + 1)}
    return tuple(sorted(rank for rank in grid if rank >= 1))


@dataclass(frozen=True)
class _Options:
    """Numbers of a round; see `search`."""

    warm_up: int
    steps: int
    gamma: float
    beta: float
    labels: bool
    rate: float
    logit_rate: float
    clip: float

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            OptionError: It is; the option is named.
        """
        for name in ("gamma", "beta", "rate", "logit_rate", "clip"):
            law = "a number above 0"
            check_number(f"search.{name}", getattr(self, name), law=law, cure="leave it out", open_low=True)
        check_count("search.warm_up", self.warm_up, least=0)
        check_count("search.steps", self.steps)
        check_flag("search.labels", self.labels)


def _check_method(method: Decomposition) -> None:
    if not isinstance(method, Decomposition):
        raise OptionError(
            "search.method", law="a method", got=repr(method)[:80], cure="try rankfold.CP(whitened=False)"
        )
    if method.needs:
        raise OptionError(
            "search.method",
            law="a method that needs no data, since its factors are trained on the weights alone",
            got=str(method),
            cure="give it whitened=False, or use SVD()",
        )


def _first(
    path: str, site: Site, method: Decomposition, ranks: Sequence[int] | Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """Candidates of a site in the first round."""
    grid = ranks.get(path, ()) if isinstance(ranks, Mapping) else ranks
    if any(type(rank) is not int or rank < 1 for rank in grid):
        raise OptionError("search.ranks", law="whole numbers of at least 1", got=repr(grid)[:80], cure="try (10, 20)")
    return tuple(rank for rank in sorted(set(grid)) if admitted(site, method, rank) is not None)


def _spacing(candidates: Sequence[int]) -> float:
    """Distance of neighbouring candidates; of a single one none."""
    return (candidates[-1] - candidates[0]) / (len(candidates) - 1) if len(candidates) > 1 else 0.0


def _round(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layers: Sequence[Mixture],
    batches: Any,
    options: _Options,
) -> None:
    """The steps of a round: of the factors alone, then of factors and logits in turns."""
    factors = [each for layer in layers for each in layer.parameters()]
    logits = [layer.logits for layer in layers]
    scale = sum(float(layer.target.square().sum()) for layer in layers)
    by_weight = torch.optim.SGD(factors, options.rate, momentum=MOMENTUM, nesterov=True)
    by_logit = torch.optim.SGD(logits, options.logit_rate, momentum=MOMENTUM, nesterov=True)

    def price() -> Tensor:
        return options.gamma * torch.stack([layer.price() for layer in layers]).pow(options.beta).sum()

    def error() -> Tensor:
        return torch.stack([layer.error() for layer in layers]).sum() / scale

    def step(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[Tensor], number: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"search, step {number}",
                law="every loss is finite",
                got=str(float(loss.detach())),
                cure="lower the rates or clip",
            )
        for each in (*factors, *logits):
            each.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        if not math.isfinite(float(norm)):
            raise NumericsError(
                f"search, step {number}", law="every gradient is finite", got=str(float(norm)), cure="lower the rates"
            )
        optimizer.step()

    for number in range(options.warm_up):
        step(error() * price().detach(), by_weight, factors, number)
    stream: Iterator[Batch] = iter(())
    for number in range(options.warm_up, options.warm_up + options.steps):
        step(error() * price(), by_weight, factors, number)
        if options.labels:
            batch = next(stream, None)
            if batch is None:
                stream = iter(batches)
                batch = next(stream)
            value = _entropy(model, modules, layers, batch)
        else:
            value = error()
        step(value * price(), by_logit, logits, number)


def _entropy(model: nn.Module, modules: Mapping[str, nn.Module], layers: Sequence[Mixture], batch: Batch) -> Tensor:
    """Cross-entropy of the model with mixed weights on a labelled batch, in eval mode."""
    target = labels_of(batch)
    if target is None:
        raise DataError(
            "data",
            law="batches with integer labels, on which the logits are trained",
            got=type(batch).__name__,
            cure="pass (inputs, labels), or labels=False",
        )
    device = device_of(model)
    args, kwargs = split_batch(to_device(batch, device))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # no gradient of its own
    weights |= {
        f"{layer.path}.weight" if layer.path else "weight": _stored(modules[layer.path], layer.mixed())
        for layer in layers
    }
    scores, _ = output_tensor(functional_call(model, weights, args, kwargs))
    target = target.to(scores.device)
    if scores.shape[:-1] == target.shape:  # classes last
        scores, target = scores.flatten(0, -2), target.flatten()
    elif scores.shape[:1] + scores.shape[2:] != target.shape:  # classes second, as torch has them
        raise DataError(
            "data",
            law="one label for each row of scores",
            got=f"labels {tuple(target.shape)} for scores {tuple(scores.shape)}",
            cure="pass labels of the outputs' shape without the classes, or labels=False",
        )
    return nn.functional.cross_entropy(scores.double(), target)


def _stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A canonical weight as the layer stores it."""
    own = tensor(layer, "weight")
    adapter = adapter_for(layer)
    if adapter is None or adapter.weight_axes != (0, 1) or adapter.geometry(layer).transposed:
        weight = weight.transpose(1, 2)
    return weight.reshape(own.shape).to(own.dtype)


def _plan(
    sites: Sites,
    method: Decomposition,
    own: Mapping[str, tuple[Site, Tensor]],
    chosen: Mapping[str, int],
) -> Plan:
    """The plan of the chosen ranks; a layer that they would make larger stays dense."""
    decisions = []
    for site in sites:
        rank = admitted(site, method, chosen[site.path]) if site.path in chosen else None
        why = "dense: no candidates"
        if rank is not None and site_cost(site, method.form, rank).params >= dense_cost(site).params:
            rank, why = None, f"dense: {chosen[site.path]} would make it larger"
        if rank is None:
            decisions.append(Decision(site.path, why=why))
        else:
            decisions.append(Decision(site.path, method, rank, "searched"))
    return Plan(tuple(decisions), sites.skips, sites.fingerprint, sites.model, split=sites.split)

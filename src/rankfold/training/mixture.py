"""A layer as a mixture of its candidate ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rankfold.cost.formula import dense_cost, site_cost
from rankfold.decompositions import Decomposition, Moments
from rankfold.factors import Factors, Rank
from rankfold.sites.site import Site


def admitted(site: Site, method: Decomposition, rank: int) -> Rank | None:
    """A number as a rank of the method, of which tied ones are tuples; None where the site does not admit it."""
    shape = site.geometry.canonical_shape
    exact = method.ranks(shape)[-1]
    own: Rank = tuple(min(rank, most) for most in exact) if isinstance(exact, tuple) else rank
    largest = max(exact) if isinstance(exact, tuple) else exact
    return own if rank <= largest and method.admits(shape, own) else None


class Mixture:
    """A layer as a mixture of candidates: their factors and logits, all trained."""

    def __init__(
        self, path: str, site: Site, weight: Tensor, method: Decomposition, ranks: tuple[int, ...], price: str
    ) -> None:
        self.path, self.ranks, self.target = path, ranks, weight
        own = [rank for each in ranks if (rank := admitted(site, method, each)) is not None]
        self.branches = [[_trained(method.decompose(group, rank, Moments())) for group in weight] for rank in own]
        self.logits = torch.zeros(len(ranks), dtype=torch.float64, device=weight.device, requires_grad=True)
        if price == "rank":
            costs = [rank / max(ranks) for rank in ranks]
        else:
            whole = dense_cost(site).amounts()[price]
            costs = [site_cost(site, method.form, rank).amounts()[price] / whole for rank in own]
        self.costs = torch.tensor(costs, dtype=torch.float64, device=weight.device)

    def probabilities(self) -> Tensor:
        """`softmax(α)`."""
        return self.logits.softmax(0)

    def parameters(self) -> Iterator[Tensor]:
        """The factors."""
        for groups in self.branches:
            for factors in groups:
                yield from (part for part in factors.stages() if part.requires_grad)

    def mixed(self) -> Tensor:
        """`W_mix`, shape (groups, out, in, kernel…)."""
        parts = [torch.stack([factors.reconstruct() for factors in groups]) for groups in self.branches]
        return torch.einsum("r,r...->...", self.probabilities(), torch.stack(parts))

    def error(self) -> Tensor:
        """`‖W − W_mix‖_F²`."""
        return (self.target - self.mixed()).square().sum()

    def price(self) -> Tensor:
        """`Σ_r p_r c_r`."""
        return (self.probabilities() * self.costs).sum()


def _trained(factors: Factors) -> Factors:
    """Factors whose tensors have gradients."""
    changed: dict[str, Any] = {}
    for field in fields(factors):
        value = getattr(factors, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.detach().clone().requires_grad_()
        elif isinstance(value, tuple) and value and all(isinstance(each, Tensor) for each in value):
            changed[field.name] = tuple(each.detach().clone().requires_grad_() for each in value)
    return replace(factors, **changed)

"""A form of a third party: a depthwise stage in the middle, and a module of its own around the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rankfold.cost.counted import count
from rankfold.cost.formula import dense_cost, site_cost
from rankfold.decompositions import Decomposition, Moments
from rankfold.errors import PlanError
from rankfold.factors import Factors, Rank
from rankfold.install.fill import filler, install_shells
from rankfold.install.merging import merge
from rankfold.layers import Geometry, form, form_of
from rankfold.layers.forms import _FORMS
from rankfold.plan import Decision, Plan
from rankfold.registry import _BY_NAME, _NAMES, register
from rankfold.sites.copies import copied
from rankfold.sites.finding import find_sites, fingerprint
from rankfold.sites.room import has_room


class Chain(nn.Module):
    """Three layers one after the other, as a module that is no `nn.Sequential`."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.middle, self.last = stages

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class CanonicalFactors(Factors):
    """`W[o, i, k] = Σ_r a[o, r] b[r, k] c[r, i]`."""

    a: Tensor
    b: Tensor
    c: Tensor
    form = "three-stage"

    @property
    def ranks(self) -> int:
        return self.c.shape[0]

    def stages(self) -> tuple[Tensor, ...]:
        ones = (1,) * (self.b.ndim - 2)
        return self.c.reshape(*self.c.shape, *ones), self.b, self.a.reshape(*self.a.shape, *ones)

    def reconstruct(self) -> Tensor:
        return torch.einsum("or,r...,ri->oi...", self.a, self.b[:, 0], self.c)

    def mixed(self, matrix: Tensor) -> CanonicalFactors:
        return CanonicalFactors(matrix @ self.a, self.b, self.c)


@pytest.fixture
def method() -> Iterator[Decomposition]:
    """Registered for the time of a test."""

    @form(
        "three-stage",
        smallest=lambda geometry: 1 if geometry.kernel else None,
        assemble=lambda g, r, parts: Chain(parts),
    )
    def staged(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
        assert isinstance(rank, int)
        width, axes = rank * geometry.groups, set(range(len(geometry.kernel)))
        return (
            geometry.on_axes(set(), inputs=geometry.inputs, outputs=width, bias=False),
            geometry.on_axes(axes, inputs=width, outputs=width, bias=False, groups=width),
            geometry.on_axes(set(), inputs=width, outputs=geometry.outputs, bias=geometry.bias),
        )

    @register("random-canonical")
    @dataclass(frozen=True)
    class RandomCanonical(Decomposition):
        """Factors that are drawn: only their shapes matter here."""

        form = "three-stage"

        def refuses(self, shape: Sequence[int]) -> str | None:
            return None if len(shape) > 2 else "a kernel"

        def ranks(self, shape: Sequence[int]) -> list[Rank]:
            return list(range(1, min(shape[:2]) + 1))

        def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> Factors:
            assert isinstance(rank, int)
            draw = torch.Generator().manual_seed(0)
            out, inputs, *kernel = weight.shape
            shapes = (out, rank), (rank, 1, *kernel), (rank, inputs)
            return CanonicalFactors(*(torch.randn(s, generator=draw, dtype=weight.dtype) for s in shapes))

    yield RandomCanonical()
    del _FORMS["three-stage"], _BY_NAME["random-canonical"], _NAMES[RandomCanonical]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_built_counted_and_merged_as_any_other(method: Decomposition, groups: int, rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(12, 4, 1))
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    site = find_sites(model, x)[0]
    plan = Plan((Decision("0", method, rank),), (), fingerprint(model))
    small = install_shells(copied(model), plan, filler(None))
    assert isinstance(small[0], Chain)  # type: ignore[index]
    assert count(small, x) - count(model, x) == site_cost(site, "three-stage", rank) - dense_cost(site)
    with torch.no_grad():
        torch.testing.assert_close(merge(small, plan)(x), small(x), rtol=1e-4, atol=1e-4)
    assert has_room(site)


def test_a_form_that_nobody_registered_is_refused_with_near_names() -> None:
    with pytest.raises(PlanError, match=r"a form of factors .* got 'matrx' .* 'matrix'"):
        form_of("matrx")

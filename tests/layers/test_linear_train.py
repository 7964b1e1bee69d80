"""The form of a linear layer's tensor train: sizes of its modes, stages, and who it does not serve."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.decompositions import Moments
from rankfold.errors import OptionError, PlanError
from rankfold.factors import factored
from rankfold.layers import Geometry, serves, stages
from rankfold.layers.geometry import Table
from rankfold.testing.matrices import normal


@pytest.mark.parametrize(
    ("width", "count", "expected"),
    [(384, 3, (8, 8, 6)), (384, 2, (24, 16)), (72, 3, (6, 4, 3)), (7, 3, (7,)), (6, 3, (3, 2)), (1024, 5, (4,) * 5)],
)
def test_factors_are_as_even_as_possible(width: int, count: int, expected: tuple[int, ...]) -> None:
    assert factored(width, count) == expected


@pytest.mark.parametrize("width", range(2, 200))
def test_factors_multiply_to_the_width(width: int) -> None:
    for count in (1, 2, 3, 4):
        sizes = factored(width, count)
        assert prod(sizes) == width
        assert len(sizes) <= count
        assert list(sizes) == sorted(sizes, reverse=True)
        assert min(sizes) > 1


def test_a_stage_runs_at_every_place_of_the_modes_behind_it() -> None:
    parts = stages(Geometry(24, 7, bias=True), "linear-train", (2, 3, 5))
    assert [(part.inputs, part.outputs, part.repeats, part.bias) for part in parts] == [
        (4, 2, 6, False),
        (6, 3, 2, False),
        (6, 5, 1, False),
        (5, 7, 1, True),
    ]
    assert [part.macs(()) for part in parts] == [48, 36, 30, 35]


def test_what_it_does_not_serve() -> None:
    assert serves("linear-train", Geometry(24, 7))
    assert not serves("linear-train", Geometry(7, 24))
    assert not serves("linear-train", Geometry(24, 7, (3,), (1,), (1,), (1,)))
    assert not serves("linear-train", Geometry(24, 24, table=Table(100)))
    assert not serves("linear-train", Geometry(24, 100, tied=True))


@pytest.mark.parametrize("rank", [3, (3,), (2, 3, 5, 2, 2), (2, 0, 5), (2, 3.0, 5)])
def test_a_rank_that_is_no_tuple_of_widths_is_refused(rank: object) -> None:
    with pytest.raises(PlanError, match=r"^rank · "):
        stages(Geometry(24, 7), "linear-train", rank)  # type: ignore[arg-type]


def test_a_table_in_a_plan_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 12)).eval()
    data = [torch.arange(30).reshape(6, 5)]
    out = rf.compress(model, data, families=[rf.LinearTrain()], budget=rf.Budget(params=0.95))
    assert out.plan.at("0").method is None
    decision = rf.Decision("0", rf.LinearTrain(), (2, 3, 5))
    plan = rf.Plan((decision,), (), out.plan.fingerprint)
    with pytest.raises(PlanError, match="the linear-train form can replace"):
        rf.apply(model, plan, stats=rf.collect(model, data, sites=rf.find_sites(model, data[0])))
    assert isinstance(model[0], nn.Embedding)


def test_a_rank_above_full_is_refused_with_the_largest() -> None:
    with pytest.raises(OptionError, match=r"widths of at most \(4, 12, 6\)"):
        rf.LinearTrain(whitened=False).decompose(normal(6, 24, seed=0), (4, 12, 7), Moments())


@pytest.mark.parametrize("modes", [1, 0, 6, 2.0, None])
def test_modes_are_two_to_five(modes: object) -> None:
    with pytest.raises(OptionError, match=r"LinearTrain\.modes"):
        rf.LinearTrain(modes=modes)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_plain_errors_are_those_of_tensorly(seed: int) -> None:
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train

    weight, rank = normal(10, 24, seed=seed), (3, 6, 5)
    drawn = weight.reshape(10, 2, 3, 4).permute(3, 2, 1, 0).contiguous()
    with tensorly.backend_context("pytorch"):
        theirs = tensorly.tt_to_tensor(tensor_train(drawn, [1, *rank, 1]))
    mine = rf.LinearTrain(whitened=False).decompose(weight, rank, Moments()).reconstruct()
    assert float((mine - weight).norm()) <= float((theirs - drawn).norm()) * (1 + 1e-9)

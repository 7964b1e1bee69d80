"""Bad models, selections and data are refused by name, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.reference.refusals import BUDGET, inputs, network, refused
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import (
    DataError,
    ModelError,
    NumericsError,
    OptionError,
    SiteError,
    TraceError,
)

# The selection.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"only": ["33"]},
            SiteError,
            r"^'33' · a selection names layers of the model · got no match · did you mean '3'\?",
        ),
        ({"exclude": ["0", "layer.*"]}, SiteError, r"^'layer\.\*' · .* · got no match · possible are '0', '3', '5'"),
        ({"only": "3"}, OptionError, r"^only · a list of paths or patterns · got '3' · try only=\['3'\]"),
        (
            {"only": [3]},
            OptionError,
            r"^only · a list of paths or patterns · got \[3\] · pass strings, or leave it out",
        ),
        ({"only": 3}, OptionError, r"^only · a list of paths or patterns · got 3 · pass strings"),
        ({"exclude": None}, OptionError, r"^exclude · a list of paths or patterns · got None · pass strings"),
        (
            {"only": []},
            SiteError,
            r"^only · the selection leaves a layer .* · got an empty selection, .* · leave `only`",
        ),
        (
            {"exclude": ["*"]},
            SiteError,
            r"^exclude · .* · got an empty selection, none of 3 layers · take a pattern out",
        ),
    ],
)
def test_an_unknown_path_in_a_selection_names_near_matches(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    refused(error, message, network(), inputs(), **options)


# The model.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[2, :2] = value
    refused(
        ModelError, r"^3\.weight · every weight is finite · got 2 of 256 NaN or infinite · look at", model, inputs()
    )


def test_a_model_on_meta_is_refused_by_the_tensor() -> None:
    with pytest.raises(
        ModelError, match=r"^0\.weight · every tensor is on a real device · got a tensor on meta · load"
    ):
        rf.compress(network().to("meta"), inputs(), budget=BUDGET)


def test_a_state_dict_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"^model · an nn\.Module · got OrderedDict · pass the module itself"):
        rf.compress(network().state_dict(), inputs(), budget=BUDGET)  # type: ignore[arg-type]


# The data.


def with_nan(sample: int) -> list[Tensor]:
    """Batches of four, one with a NaN."""
    data = inputs()
    data[sample, 5] = float("nan")
    return list(data.split(4))


@pytest.mark.parametrize("repair", [None, rf.Lockstep()])
@pytest.mark.parametrize(("sample", "batch"), [(0, 1), (13, 4)])
def test_activations_that_are_not_finite_name_site_and_batch(
    sample: int, batch: int, repair: rf.Lockstep | None
) -> None:
    message = rf"^'0' · every activation is finite · got NaN or infinity in the input-gram of batch {batch} · look at"
    refused(NumericsError, message, network(), with_nan(sample), repair=repair)


def test_a_batch_keeps_its_number_where_one_before_it_is_held_out_whole() -> None:
    data = inputs()
    data[11] = float("nan")
    refused(NumericsError, "of batch 12 ·", network(), list(data.split(1)), repair=None)


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        (None, r"^output of the original model · every output is finite · got NaN or infinity in batch 3 · look at"),
        (rf.Lockstep(), r"every .* is finite · got NaN or infinity .*(sample 10|held-out) .*· look at"),
    ],
)
def test_a_held_out_sample_that_is_not_finite_is_refused(repair: rf.Lockstep | None, message: str) -> None:
    refused(NumericsError, message, network(), with_nan(9), repair=repair)


class Overflowing(nn.Module):
    """Its second layer sees infinities where an input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.exp(self.first(x)))
        return result


def test_activations_that_overflow_name_the_first_site_that_sees_them() -> None:
    data = inputs()
    data[6] = 1e6
    refused(NumericsError, r"^'second' · .* of batch 2 ·", Overflowing(), list(data.split(4)))


def _generator() -> Iterator[Tensor]:
    yield inputs()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"^data · at least one batch · got none · check the folder or loader"),
        (torch.zeros(0, 12), r"^data · .* at least one sample along its first axis · got shape \(0, 12\)"),
        ([torch.zeros(0, 12)], r"^data · .* at least one sample along its first axis · got shape \(0, 12\)"),
        (
            [inputs(), torch.zeros(0, 12)],
            r"^batch 2 · .* at least one sample along its first axis · got shape \(0, 12\)",
        ),
        ([{}], r"^data · a batch is a tensor, a tuple .*, or a dict .* · got dict"),
        ([{"x": 3}], r"a dict batch holds at least one tensor · got keys \['x'\]"),
        ([[1.0, 2.0]], r"^data · a batch is a tensor, .* · got list"),
        (
            _generator(),
            r"^data · a re-iterable of batches · got a generator, which gives its batches only once · pass a",
        ),
        (map(torch.Tensor.float, [inputs()]), r"a re-iterable of batches · got a map, which"),
        (None, r"a re-iterable of batches · got NoneType"),
    ],
    ids=["list", "tensor", "batch", "later batch", "dict", "no tensor", "numbers", "generator", "map", "none"],
)
def test_data_that_is_none_is_refused(data: Any, message: str) -> None:
    refused(DataError, message, network(), data)


def test_a_batch_of_the_wrong_shape_is_refused_with_its_shape() -> None:
    message = (
        r"^Sequential · the model runs on a batch of the data · got .* for inputs \{'0': \(8, 11\)\} · check the shape"
    )
    refused(TraceError, message, network(), torch.zeros(8, 11))


def test_a_later_batch_of_the_wrong_shape_is_refused_by_its_number() -> None:
    message = (
        r"^batch 3 · the model runs on every batch of the data · got .* · give all batches the shape, dtype and keys"
    )
    refused(TraceError, message, network(), [inputs(8), inputs(8), torch.zeros(8, 11)])


@pytest.mark.parametrize("late", [inputs(8).double(), {"pixels": inputs(8)}], ids=["dtype", "keys"])
def test_a_later_batch_of_another_dtype_or_with_other_keys_is_refused_by_its_number(late: Any) -> None:
    message = r"^batch 2 · the model runs on .* · give all batches the shape, dtype and keys of the first"
    refused(TraceError, message, network(), [inputs(8), late])


def test_a_keyword_that_the_model_does_not_take_is_refused_by_name() -> None:
    refused(TraceError, r"unexpected keyword argument 'pixels'.*'pixels': \(24, 12\)", network(), {"pixels": inputs()})

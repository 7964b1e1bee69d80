"""Products that torch's own counter does not know are counted by arithmetic; what nothing counts is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

import rankfold as rf
from rankfold.cost.counted import count_macs, counted, run_one
from rankfold.cost.operators import FORMULAS, PRODUCTS
from rankfold.errors import BudgetError

STEPS, INPUTS, HIDDEN = 7, 16, 12
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


class Applied(nn.Module):
    """Some layers and a function of them and the input as forward."""

    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class OneByOneFails(nn.Module):
    """A model of which one sample alone gets to the last layer and fails there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


def test_a_try_that_fails_adds_nothing_to_the_count() -> None:
    model, x = OneByOneFails().train(), torch.randn(6, 8)
    assert run_one(model, x) == 6
    assert count_macs(model, x) == 8 * 16 + 16 * 4
    assert [site.macs for site in rf.find_sites(model, x)] == [8 * 16, 16 * 4]
    assert [site.calls for site in rf.find_sites(model, x)] == [(((), 1),), (((), 1),)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True], ids=["forwards", "both ways"])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_count_their_products(kind: Any, both: bool, layers: int, dtype: torch.dtype) -> None:
    model = kind(INPUTS, HIDDEN, num_layers=layers, bidirectional=both, batch_first=True, dtype=dtype)
    gates, ways = GATES[kind] * HIDDEN, 1 + both
    first = gates * (INPUTS + HIDDEN)
    later = gates * (ways * HIDDEN + HIDDEN)
    expected = STEPS * ways * (first + (layers - 1) * later)
    assert count_macs(model, torch.randn(3, STEPS, INPUTS, dtype=dtype)) == expected


def test_a_projected_lstm_counts_its_projection() -> None:
    model = nn.LSTM(INPUTS, HIDDEN, proj_size=5, batch_first=True)
    expected = STEPS * (4 * HIDDEN * (INPUTS + 5) + HIDDEN * 5)
    assert count_macs(model, torch.randn(3, STEPS, INPUTS)) == expected


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_sequence_counts_the_steps_it_has(kind: Any) -> None:
    def packed(self: Any, x: Tensor) -> Any:
        lengths = [STEPS, 4, 2][: len(x)]
        return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    model = Applied(packed, rnn=kind(INPUTS, HIDDEN, batch_first=True))
    assert count_macs(model, torch.randn(3, STEPS, INPUTS)) == STEPS * GATES[kind] * HIDDEN * (INPUTS + HIDDEN)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_count_their_products(kind: Any) -> None:
    assert count_macs(kind(INPUTS, HIDDEN), torch.randn(3, INPUTS)) == GATES[kind] * HIDDEN * (INPUTS + HIDDEN)


def test_a_bilinear_layer_counts_every_product_of_a_weight() -> None:
    model = Applied(lambda self, x: self.pair(x, x[..., :3]), pair=nn.Bilinear(8, 3, 5))
    assert count_macs(model, torch.randn(2, 8)) == 8 * 3 * 5
    assert count_macs(model, torch.randn(2, 6, 8)) == 6 * 8 * 3 * 5


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda self, x: torch.mv(self.fc.weight, x[0]), 8 * 4),
        (lambda self, x: torch.addmv(self.fc.bias, self.fc.weight, x[0]), 8 * 4),
        (lambda self, x: torch.dot(x[0], x[0]), 8),
        (lambda self, x: torch.vdot(x[0], x[0]), 8),
        (lambda self, x: torch.addbmm(torch.zeros(2, 3), torch.ones(5, 2, 4), torch.ones(5, 4, 3)), 5 * 2 * 4 * 3),
        (lambda self, x: torch.einsum("bi,oi->bo", x, self.fc.weight), 8 * 4),
    ],
    ids=["mv", "addmv", "dot", "vdot", "addbmm", "einsum"],
)
def test_products_with_a_vector_are_counted(function: Any, macs: int) -> None:
    model = Applied(function, fc=nn.Linear(8, 4))
    found = counted(model, torch.randn(3, 8))
    assert (found.macs, found.missed) == (macs, ())


def test_macs_are_shared_out_among_the_modules_that_do_them() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    assert counted(model, torch.randn(3, 8)).by_module == {"0": 32, "1.1": 16}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    mixing = Applied(lambda self, x: self.mix(x, x, x)[0], mix=attention)
    found = counted(mixing, torch.randn(3, 5, 8))
    assert found.by_module == {"mix": found.macs} != {}


def test_a_fused_recurrent_kernel_of_a_gpu_counts_as_the_layer_does_here() -> None:
    rnn = nn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True, proj_size=5, batch_first=True, dtype=torch.float64)
    shapes = [tuple(weight.shape) for weight in rnn._flat_weights]
    flops = FORMULAS[torch.ops.aten._cudnn_rnn]((3, STEPS, INPUTS), shapes, 5, None, (4, 3, 5), out_shape=None)
    assert flops == 2 * 3 * count_macs(rnn, torch.randn(3, STEPS, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("first", "second", "ends", "macs"),
    [
        ((12, 16), (3, 16, 8), [4, 8, 12], 12 * 16 * 8),
        ((3, 4, 16), (3, 16, 8), None, 3 * 4 * 16 * 8),
        ((4, 24), (24, 8), [8, 16, 24], 4 * 24 * 8),
        ((3, 4, 16), (16, 24), [8, 16, 24], 4 * 16 * 24),
    ],
    ids=["rows", "batches", "inner", "columns"],
)
def test_products_in_groups_are_counted(first: Any, second: Any, ends: Any, macs: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        return torch._grouped_mm(torch.ones(first, dtype=x.dtype), torch.ones(second, dtype=x.dtype), offs=offsets)

    found = counted(Applied(forward), torch.zeros(1, 1, dtype=torch.bfloat16))
    assert (found.macs, found.missed) == (macs, ())


def test_an_operator_is_counted_or_missed_and_not_both() -> None:
    counted_ones = {packet.__name__ for packet in (*flop_registry, *FORMULAS)}
    assert not PRODUCTS & counted_ones


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.eye(8).to_sparse(), self.fc(x).t()).t()


@torch.library.custom_op("rankfold_tests::product", mutates_args=())
def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.deep = Applied(lambda self, x: _product(x, self.own.weight), own=nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.fc(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "missed"),
    [(_Sparse(), "aten::_sparse_addmm"), (_Custom(), "rankfold_tests::product in deep")],
    ids=["sparse", "custom"],
)
def test_a_product_that_nothing_counts_is_named(model: nn.Module, missed: str) -> None:
    assert counted(model, torch.randn(3, 8)).missed == (missed,)
    data = [torch.randn(16, 8)]
    with pytest.raises(BudgetError, match=rf"^Budget.macs · .* · got {missed} · "):
        rf.compress(model, data, budget=rf.Budget(macs=0.5))
    out = rf.compress(model, data, budget=rf.Budget(params=0.9), repair=None, weighting=False)
    assert any(note.startswith("not counted in MACs: ") and missed in note for note in out.report.notes)


def test_what_multiplies_no_matrices_is_not_called_uncounted() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.table(x.long().abs()).sum(1) + torch.fft.rfft(x).real.sum() + torch.outer(x[0], x[0]).sum()

    found = counted(Applied(forward, table=nn.Embedding(100, 4)), torch.randn(3, 8))
    assert (found.macs, found.missed) == (0, ())


def test_the_denominator_knows_recurrent_layers() -> None:
    model = Applied(
        lambda self, x: self.head(self.rnn(x)[0]), rnn=nn.LSTM(8, 8, batch_first=True), head=nn.Linear(8, 8)
    )
    sites = rf.find_sites(model, torch.randn(2, 5, 8))
    assert sites.cost.macs == 5 * (4 * 8 * 16 + 8 * 8)
    assert [skip.path for skip in sites.skips] == ["rnn"]

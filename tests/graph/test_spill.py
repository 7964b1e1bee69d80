"""Laws of values that are spilled to disk."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import OptionError, WriteError
from rankfold.graph.spill import Spill, parse_memory
from rankfold.graph.walk import Arrival, Walk, weights_of
from rankfold.sites.finding import find_sites


class Residual(nn.Module):
    """Two convolutions with a skip around the second, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def images() -> list[Tensor]:
    return list(torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(20))


def _walked(limit: int | None) -> tuple[list[Tensor], Spill, list[int]]:
    """Outputs of the compressed side, where every site adds a half; and the bytes held when each site is reached."""
    model, spill, held = Residual().eval(), Spill(limit), []
    sites = find_sites(model, images()[0])
    assert sites.graph.program is not None
    modules = dict(model.named_modules())

    def on_site(arrival: Arrival) -> nn.Module:
        held.append(spill.held)
        layer = modules[arrival.call.path]
        return lambda x: layer(x) + 0.5  # type: ignore[return-value]

    calls = sites.in_graph()
    output = Walk(sites.graph.program, weights_of(model), calls, images(), on_site, {}, spill).run()
    return [compressed[0] for _, compressed in output], spill, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_spilled_tensor_comes_back_with_its_bits_and_layout(dtype: torch.dtype) -> None:
    tensor = (torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    layouts = [tensor, tensor.to(memory_format=torch.channels_last), tensor.transpose(0, 3), tensor[:, 0], tensor[:0]]
    values = Spill(0).values(layouts)
    for before, after in zip(layouts, values, strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
    assert [after.stride() for after in values][:3] == [before.stride() for before in layouts][:3]


def test_an_expanded_tensor_comes_back_equal() -> None:
    tensor = torch.arange(3.0)[:, None].expand(3, 4)
    assert torch.equal(Spill(0).values([tensor])[0], tensor)


def test_nests_come_back_as_nests() -> None:
    entry = {"a": (torch.ones(3), 5, None), "b": [torch.zeros(2, 2)]}
    back = Spill(0).values([entry])[0]
    assert back["a"][1:] == (5, None)
    assert torch.equal(back["a"][0], entry["a"][0])
    assert torch.equal(back["b"][0], entry["b"][0])


def test_memory_is_used_up_to_the_limit_and_files_after_it() -> None:
    spill = Spill(1000)
    values = spill.values(torch.zeros(100) for _ in range(5))
    assert spill.held == 800
    assert spill.written == 3 * 400
    values.release(0)
    assert spill.held == 400
    values.append(torch.zeros(100))
    assert (spill.held, spill.written) == (800, 1200)
    del values
    assert spill.held == 0


def test_no_file_is_seen_and_none_stays_open(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    values = Spill(0, tmp_path).values([torch.ones(10)])
    assert torch.equal(values[0], torch.ones(10))
    if os.name == "posix":
        assert list(tmp_path.iterdir()) == []
    del values
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"nowhere.*raise `memory`"):
        Spill(0, tmp_path / "nowhere").values([torch.ones(10)])


def test_a_walk_gives_the_same_bits_with_any_limit() -> None:
    free, whole, _ = _walked(None)
    assert whole.written == 0
    for limit in (0, 50_000, 10**9):
        bound, spill, held = _walked(limit)
        assert (spill.written > 0) == (limit < 10**9)
        assert max(held) <= limit
        for a, b in zip(free, bound, strict=True):
            assert torch.equal(a, b)


def test_a_walk_holds_at_a_site_its_input_its_output_and_the_skip_alone() -> None:
    _, _, held = _walked(None)
    plane = 60 * 8 * 8 * 8 * 4  # bytes of a value of eight channels
    first, second, head = held
    assert first == plane  # the original's output; the input is the caller's
    assert second == 3 * plane  # the input in both networks, which is the skip too, and the original's output
    assert head <= 60 * 4 * (8 + 8 + 4)


def test_compress_gives_the_same_bits_with_a_limit() -> None:
    model = Residual().eval()
    free, bound = (
        rf.compress(model, images(), budget=rf.Budget(params=0.8), memory=memory).model for memory in (None, "20KB")
    )
    for name, value in free.state_dict().items():
        assert torch.equal(value, bound.state_dict()[name]), name


@pytest.mark.parametrize(
    ("text", "size"), [("512MB", 512 * 2**20), ("1.5 gb", 3 * 2**29), ("10B", 10), (123, 123), (None, None)]
)
def test_sizes_are_understood(text: Any, size: int | None) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["512", "MB", "-1MB", "0.1B", "lots", 0, -5, True, 1.5])
def test_other_sizes_are_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="512MB"):
        rf.compress(Residual(), images(), budget=rf.Budget(params=0.8), memory=text)

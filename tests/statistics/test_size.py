"""Laws of memory: what moments take is known beforehand, bounded, and a failed allocation is called that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import MemoryLimitError, bytes_shown, is_out_of_memory
from rankfold.repair.moments import PairMoments, SplitMoments
from rankfold.statistics import size
from rankfold.statistics.size import bounded, size_of, sizes_of

NAMES = ("input-gram", "input-mean", "output-gram")


class Taps(nn.Module):
    """A convolution of many taps over several channels between two narrow layers."""

    def __init__(self, channels: int = 16, taps: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv1d(1, channels, 5, padding=2)
        self.wide = nn.Conv1d(channels, 8, taps)
        self.head = nn.Linear(8, 64)
        self.last = nn.Linear(64, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.first(x))))
        return self.last(torch.relu(self.head(x.mean(2))))  # type: ignore[no-any-return]


def signals(samples: int = 40) -> list[Tensor]:
    return list(torch.randn(samples, 1, 48, generator=torch.Generator().manual_seed(1)).split(20))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that 512 features are too wide, and 80 are not."""
    monkeypatch.setattr(size, "SMALL_GRAM", 8 * 100**2)
    monkeypatch.setattr(size, "LARGEST_GRAM", 8 * 400**2)
    monkeypatch.setattr(size, "CHUNK_BYTES", 1)


def test_predicted_bytes_of_statistics_are_those_collected() -> None:
    model, data = Taps(), signals()
    sites = rf.find_sites(model, data[0])
    collected = rf.collect(model, data, sites=sites, statistics=NAMES)
    rf.collect_gradients(model, data, collected, sites=sites)
    for site in sites:
        own = collected.sites[site.path]
        sums = [each for statistic in own.values() for each in (statistic.total, statistic.first) if each is not None]
        assert size_of(site, list(own)).statistics == sum(each.nbytes for each in sums), site.path


def test_predicted_bytes_of_a_repair_are_those_of_its_moments() -> None:
    (site,) = (site for site in rf.find_sites(Taps(), signals()[0]) if site.path == "wide")
    split = SplitMoments.zeros(1, 512, 8, torch.device("cpu"))
    live = [getattr(each, name) for each in (*split.parts, split.fit) for name in ("xx", "yx", "x", "y", "yy")]
    assert size_of(site, NAMES).repair == sum(each.nbytes for each in live)
    assert size_of(site, NAMES, repaired=False).repair == 0


def test_a_patch_that_is_too_wide_is_a_skip_with_its_reason(small: None) -> None:
    sites = rf.find_sites(Taps(), signals()[0])
    kept = bounded(sites, NAMES)
    assert [site.path for site in kept] == [site.path for site in sites if site.path != "wide"]
    (skip,) = (skip for skip in kept.skips if skip.path == "wide")
    assert skip.kind == "too wide"
    assert "a patch of 512 features" in skip.reason
    assert "2 MB" in skip.reason  # 512² · 8 bytes


def test_default_limits_take_in_the_layers_of_common_networks() -> None:
    """A 3×3 over 512 channels, a 9,216-wide head of a small classifier, a Llama's down-projection."""
    for layer, row in ((nn.Conv2d(512, 512, 3), (1, 512, 3, 3)), (nn.Linear(9216, 128), (1, 9216))):
        model = nn.Sequential(layer.requires_grad_(False))
        assert len(bounded(rf.find_sites(model, torch.zeros(row)), NAMES)) == 1
    site = rf.find_sites(nn.Sequential(nn.Linear(11008, 4096)), torch.zeros(1, 11008))[0]
    assert size._too_wide(site, NAMES, repaired=True) is None
    site = rf.find_sites(nn.Sequential(nn.Linear(65536, 64)), torch.zeros(1, 65536))[0]
    assert "34.4 GB" not in (why := str(size._too_wide(site, NAMES, repaired=True)))
    assert "32 GB" in why


@pytest.mark.parametrize("families", [None, [rf.WhitenedSVD()], [rf.Interpolative()]])
def test_a_network_with_a_layer_too_wide_is_compressed_around_it(
    small: None, families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widest = []
    zeros = PairMoments.zeros

    def noted(groups: int, features: int, *rest: Any) -> PairMoments:
        widest.append(features)
        return zeros(groups, features, *rest)

    monkeypatch.setattr(PairMoments, "zeros", noted)
    model = Taps()
    out = rf.compress(model, signals(), budget=rf.Budget(params=0.95), families=families)
    assert torch.equal(out.model.wide.weight, model.wide.weight)
    assert out.report.after.params <= 0.95 * out.report.before.params
    assert max(widest) < 512
    assert any("wide (too wide" in note for note in out.report.notes)
    assert "too wide" in next(skip.reason for skip in out.plan.skips if skip.path == "wide")


def test_channels_that_a_layer_too_wide_reads_stay(small: None) -> None:
    model = Taps()
    sites = bounded(rf.find_sites(model, signals()[0]).with_fixed(), NAMES)
    channels = rf.find_channels(model, sites)
    assert "first" not in {path for group in channels for path in group.made}
    assert "too wide" in next(skip.reason for skip in channels.skips if skip.path == "first")


def test_a_limit_of_memory_bounds_moments_too(small: None) -> None:
    sites = rf.find_sites(Taps(), signals()[0])
    whole = sizes_of(sites, NAMES).moments
    assert bounded(sites, NAMES, limit=whole) is sites
    kept = bounded(sites, NAMES, limit=whole - 1)
    assert "wide" not in [site.path for site in kept]
    assert sizes_of(kept, NAMES).moments <= whole - 1
    assert bytes_shown(whole - 1) in next(skip.reason for skip in kept.skips if skip.path == "wide")


def test_without_a_limit_moments_take_at_most_half_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size, "CHUNK_BYTES", 1)
    sites = rf.find_sites(Taps(), signals()[0])
    whole = sizes_of(sites, NAMES).moments
    assert bounded(sites, NAMES, machine=2 * whole) is sites
    kept = bounded(sites, NAMES, machine=2 * whole - 2)
    (skip,) = (skip for skip in kept.skips if skip.path == "wide")
    assert "half of the memory here" in skip.reason
    assert size.machine_memory(torch.device("cpu")) is None or size.machine_memory(torch.device("cpu")) > 2**20


def test_a_limit_below_all_moments_is_refused_before_the_model_runs(small: None) -> None:
    with pytest.raises(MemoryLimitError, match=r"memory · .* · got .* · pass a larger memory="):
        rf.compress(Taps(), signals(), budget=rf.Budget(params=0.9), memory=1000)


def test_a_plan_whose_moments_do_not_fit_is_refused(small: None) -> None:
    model = Taps()
    plan = rf.compress(model, signals(), budget=rf.Budget(params=0.8), families=[rf.WhitenedSVD()], memory="100MB").plan
    assert "wide" in [decision.site for decision in plan.decisions]
    with pytest.raises(MemoryLimitError, match="'wide'"):
        rf.execute(model, signals(), plan, memory="1MB")


SITES = ["'first'", "'wide'", "'head'", "'last'"]
REFUSAL = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.mark.parametrize(
    "cause",
    [
        MemoryError(),
        RuntimeError(REFUSAL),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("not enough memory"),
    ],
)
def test_what_is_out_of_memory_is_known(cause: Exception) -> None:
    assert is_out_of_memory(cause)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("cause", [MemoryError(), RuntimeError(REFUSAL)])
@pytest.mark.parametrize(
    ("module", "name", "places"),
    [
        ("rankfold.statistics._moments", "gram", SITES),
        ("rankfold.repair.moments", "gram", SITES),
        ("rankfold.repair.site", "ridge", SITES),
        ("rankfold.allocation.measuring", "output_errors", ["curves"]),
        ("rankfold.statistics._gradients", "gram", ["gradients"]),
    ],
)
def test_a_failed_allocation_is_called_that(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, places: list[str], cause: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise cause

    monkeypatch.setattr(f"{module}.{name}", fails)
    with pytest.raises(MemoryLimitError, match="exclude the widest layers") as error:
        rf.compress(Taps(), signals(), budget=rf.Budget(params=0.8))
    assert error.value.place in places
    assert isinstance(error.value, MemoryError)


def test_a_forward_that_is_out_of_memory_is_no_trace_error() -> None:
    class Hungry(Taps):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 2:
                raise RuntimeError(REFUSAL)
            return super().forward(x)

    with pytest.raises(MemoryLimitError, match="DefaultCPUAllocator"):
        rf.compress(Hungry(), signals(), budget=rf.Budget(params=0.8))
    with pytest.raises(MemoryLimitError, match="batch 1"):
        rf.compare(Hungry(), Taps(), signals())

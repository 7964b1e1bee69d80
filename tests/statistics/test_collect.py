"""One pass over the data: every site's moments, in chunks, as if all patches had been there at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.data.splits import Split
from rankfold.errors import DataError, NumericsError, OptionError, TraceError
from rankfold.sites.finding import find_sites
from rankfold.sites.site import Sites
from rankfold.statistics import Statistics
from rankfold.statistics import collect as module
from rankfold.statistics.collect import collect, tells_apart
from rankfold.testing import toy_network
from rankfold.testing.devices import generator_states, same_states
from rankfold.testing.matrices import normal

ALL = ("input-gram", "input-mean", "output-gram")


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, Tensor, Sites]:
    network, inputs = toy_network()
    return network, inputs, find_sites(network, inputs)


def seen_by(network: nn.Module, path: str, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of every call of a layer."""
    calls: list[tuple[Tensor, Tensor]] = []
    layer = network.get_submodule(path)
    handle = layer.register_forward_hook(lambda layer, args, output: calls.append((args[0], output)))
    with torch.no_grad():
        network(inputs)
    handle.remove()
    return calls


def same(first: Statistics, second: Statistics, *, tolerance: float = 1e-6) -> None:
    for path, own in first.sites.items():
        for name, statistic in own.items():
            other = second.sites[path][name]
            assert statistic.count == other.count
            assert statistic.total is not None
            assert other.total is not None
            scale = float(other.total.abs().max())
            torch.testing.assert_close(statistic.total, other.total, rtol=0, atol=tolerance * scale)


def test_conv_moments_equal_those_of_all_patches_at_once(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    statistics = collect(network, inputs, sites=sites, statistics=ALL)
    site = next(site for site in sites if site.geometry.groups == 2)
    ((seen, output),) = seen_by(network, site.path, inputs)
    geometry = site.geometry
    patches = F.unfold(seen.double(), geometry.kernel, padding=geometry.padding, stride=geometry.stride)
    patches = patches.unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # groups × positions × features
    own = statistics.sites[site.path]
    assert own["input-gram"].count == patches.shape[1]
    torch.testing.assert_close(own["input-gram"].mean(), patches.mT @ patches / patches.shape[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own["input-mean"].mean(), patches.mean(1), rtol=1e-6, atol=1e-7)
    rows = output.double().flatten(2).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(own["output-gram"].mean(), rows.mT @ rows / rows.shape[1], rtol=1e-5, atol=1e-6)


def test_every_call_of_a_shared_layer_counts(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    site = next(site for site in sites if len(site.calls) == 2)
    calls = seen_by(network, site.path, inputs)
    assert len(calls) == 2
    rows = torch.cat([seen for seen, _ in calls]).double()
    own = collect(network, inputs, sites=sites).sites[site.path]
    assert own["input-gram"].count == 2 * len(inputs)
    torch.testing.assert_close(own["input-gram"].mean()[0], rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", [1, 2000, 60_000])
def test_chunks_do_not_matter_and_keep_to_their_size(
    found: tuple[nn.Module, Tensor, Sites], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, inputs, sites = found
    whole = collect(network, inputs, sites=sites, statistics=ALL)
    largest = []
    update = module.Statistic.update

    def watched(self: module.Statistic, part: Tensor, out: Tensor | None = None, *, first: bool = False) -> None:  # type: ignore[name-defined]
        largest.append(part.nbytes if part.shape[1] > 1 else 0)  # a single position cannot be cut
        update(self, part, out, first=first)

    monkeypatch.setattr(module, "CHUNK_BYTES", room)
    monkeypatch.setattr(module.Statistic, "update", watched)
    same(collect(network, inputs, sites=sites, statistics=ALL), whole)
    assert max(largest) <= room
    assert len(largest) > len(sites) * len(ALL)


def test_halves_are_every_other_sample(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    whole = collect(network, [inputs[:5], inputs[5:6], inputs[6:]], sites=sites, statistics=ALL)
    for half in (0, 1):
        own = collect(network, inputs[half::2], sites=sites, statistics=ALL)
        for site in sites:
            for name, statistic in whole.sites[site.path].items():
                if statistic.halved:
                    assert statistic.has_halves
                    expected = own.sites[site.path][name].mean()
                    torch.testing.assert_close(statistic.mean(half), expected, rtol=1e-5, atol=1e-6)


def test_one_sample_has_no_halves(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    stats = collect(network, inputs[:1], sites=sites)
    assert not stats.has_halves(sites[0].path)
    with pytest.raises(ValueError, match="does not tell the halves"):
        stats.sites[sites[0].path]["input-gram"].mean(0)
    assert stats.moments(sites[0], 0).gram is not None


def test_batches_do_not_matter(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    whole = collect(network, inputs, sites=sites, statistics=ALL)
    parts = collect(network, [inputs[:5], inputs[5:6], inputs[6:]], sites=sites, statistics=ALL)
    same(parts, whole)
    assert (parts.manifest["samples"], parts.manifest["batches"]) == (12, 3)


def test_merging_equals_collecting_over_both(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    first, second = (collect(network, part, sites=sites, statistics=ALL) for part in (inputs[:5], inputs[5:]))
    merged = first.merge(second)
    same(merged, collect(network, inputs, sites=sites, statistics=ALL))
    assert (merged.manifest["samples"], merged.manifest["batches"]) == (12, 2)
    assert merged.manifest["sha256"] == [first.manifest["sha256"], second.manifest["sha256"]]


def test_only_alike_statistics_merge(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    both = collect(network, inputs, sites=sites)
    with pytest.raises(DataError, match="same sites and statistics"):
        both.merge(collect(network, inputs, sites=sites, statistics=["input-gram"]))
    with pytest.raises(DataError, match="of one model"):
        both.merge(Statistics(both.sites, both.manifest, "another"))


@pytest.mark.parametrize("positions", [1, 4])
def test_drawn_positions_are_seeded_and_counted(found: tuple[nn.Module, Tensor, Sites], positions: int) -> None:
    network, inputs, sites = found
    before = generator_states()
    first, again, other = (collect(network, inputs, sites=sites, positions=positions, seed=seed) for seed in (1, 1, 2))
    assert same_states(before, generator_states())
    differing = 0
    for site in sites:
        grams = [each.sites[site.path]["input-gram"] for each in (first, again, other)]
        assert torch.equal(grams[0].total, grams[1].total)
        differing += not torch.equal(grams[0].total, grams[2].total)
        most = positions if site.geometry.kernel else 1
        assert grams[0].count == len(inputs) * most * len(site.calls)
    assert differing == sum(bool(site.geometry.kernel) for site in sites)


def test_more_positions_than_there_are_is_all_of_them(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    every, most = (collect(network, inputs, sites=sites, positions=n) for n in (None, 10**6))
    for site in sites:
        for name in ("input-gram", "input-mean"):
            assert torch.equal(every.sites[site.path][name].total, most.sites[site.path][name].total)


def test_tokens_are_positions() -> None:
    layer = nn.Linear(6, 5)
    inputs = normal(3, 11, 6, seed=1).float()
    sites = find_sites(layer, inputs)
    gram = collect(layer, inputs, sites=sites).sites[""]["input-gram"]
    rows = inputs.double().flatten(0, 1)
    assert gram.count == 33
    torch.testing.assert_close(gram.mean()[0], rows.mT @ rows / 33, rtol=1e-6, atol=1e-6)
    assert collect(layer, inputs, sites=sites, positions=4).sites[""]["input-gram"].count == 12


def test_the_model_is_left_as_it_was(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    bits = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    network[1].eval()  # a mixture of modes
    modes = [module.training for module in network.modules()]
    try:
        collect(network, inputs, sites=sites)
        assert [module.training for module in network.modules()] == modes
        assert not any(module._forward_hooks for module in network.modules())
        assert all(torch.equal(tensor, bits[name]) for name, tensor in network.state_dict().items())
        with pytest.raises(TraceError, match="batch 2"):
            collect(network, [inputs, inputs[:, :1]], sites=sites)
        assert not any(module._forward_hooks for module in network.modules())
        assert [module.training for module in network.modules()] == modes
    finally:
        network.eval()


def test_activations_that_are_not_finite_are_named_with_site_and_batch(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    bad = inputs.clone()
    bad[3] = float("nan")
    with pytest.raises(NumericsError, match="batch 2") as caught:
        collect(network, [inputs, bad], sites=sites)
    assert caught.value.place == repr(sites[0].path)


def test_no_statistics_still_identify_the_data(found: tuple[nn.Module, Tensor, Sites]) -> None:
    network, inputs, sites = found
    statistics = collect(network, inputs, sites=sites, statistics=[])
    assert statistics.sites == {site.path: {} for site in sites}
    assert statistics.manifest["sha256"] == collect(network, inputs, sites=sites).manifest["sha256"]
    assert statistics.manifest["sha256"] != collect(network, inputs + 1, sites=sites, statistics=[]).manifest["sha256"]


@pytest.mark.parametrize("positions", [0, -1, 1.5, True, "64"])
def test_positions_are_a_whole_number(found: tuple[nn.Module, Tensor, Sites], positions: object) -> None:
    network, inputs, sites = found
    with pytest.raises(OptionError, match="positions"):
        collect(network, inputs, sites=sites, positions=positions)  # type: ignore[arg-type]


class Branch(nn.Module):
    """Uses its second layer for large inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        return self.second(hidden) if float(inputs.abs().max()) > 10 else hidden


def test_a_site_that_no_batch_reaches_is_named() -> None:
    network = Branch()
    inputs = normal(4, 6, seed=1).float()
    sites = find_sites(network, 100 * inputs)
    assert [site.path for site in sites] == ["first", "second"]
    with pytest.raises(DataError, match="'second'"):
        collect(network, inputs, sites=sites)


def test_many_samples_need_few_positions_each() -> None:
    model = nn.Conv2d(3, 4, 3, padding=1).eval()
    batches = [torch.randn(50, 3, 16, 16) for _ in range(10)]
    sites = find_sites(model, batches[0])

    def looked_at(data: Any, **options: Any) -> int:
        return collect(model, data, sites=sites, **options).sites[""]["input-gram"].count

    assert looked_at(batches, positions=64) == 500 * 64
    assert looked_at(batches, positions=64, enough=48) == 500 * 33  # 33 · 500 is the first multiple above 16,384
    assert looked_at(batches, positions=20, enough=48) == 500 * 20
    assert looked_at(batches, positions=64, enough=800) == 500 * 44  # 800 · 27 features
    assert looked_at(Split(batches, 10, held_out=False), positions=64, enough=48) == 450 * 37
    assert looked_at(torch.utils.data.DataLoader(torch.cat(batches), 50), positions=64, enough=48) == 500 * 64
    with pytest.raises(OptionError, match="enough"):
        looked_at(batches, positions=64, enough=0)


class TimeFirst(nn.Module):
    """Layers that see time in front, as `batch_first=False` has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences of the batch, samples × time × 6, to values of each sample."""
        y: Tensor = self.out(torch.relu(self.inner(x.transpose(0, 1))).mean(0))
        return y


def test_with_time_in_front_samples_are_not_told_apart_by_it() -> None:
    """Eight steps of four samples: a multiple, but rows are steps, and each holds all samples."""
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    sites = find_sites(TimeFirst().eval(), x)
    assert (sites.at("inner").rows, sites.at("out").rows) == ((8,), (1,))
    stats = collect(TimeFirst().eval(), [x], sites=sites)
    assert not stats.has_halves("inner")
    assert stats.has_halves("out")
    assert tells_apart(8, 4, (2,))
    assert not tells_apart(8, 4, (8,))
    assert tells_apart(8, 1, (8,))
    assert tells_apart(8, 4, ())

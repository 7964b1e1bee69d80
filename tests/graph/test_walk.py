"""The interpreter against the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.data.batches import micro_batches
from rankfold.graph.regions import schedule
from rankfold.graph.walk import Arrival, Walk, weights_of
from rankfold.sites.finding import find_sites


class Late(nn.Module):
    """A skip branch that is computed after the main branch, with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(3, 6, 1)
        self.twice = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.main(x))
        y = F.relu(branch + self.side(x)).mean((2, 3))
        return self.twice(F.relu(self.twice(y)))  # type: ignore[no-any-return]


def _walk(model: nn.Module, batches: list[Tensor], change: float = 0.0) -> tuple[Tensor, Tensor, list[Arrival]]:
    sites = find_sites(model, batches[0])
    program = sites.graph.program
    assert program is not None
    calls = sites.in_graph()
    modules = dict(model.named_modules())
    seen: list[Arrival] = []

    def on_site(arrival: Arrival) -> nn.Module:
        seen.append(arrival)
        if not change:
            return modules[arrival.call.path]
        layer = modules[arrival.call.path]
        return lambda x: layer(x) + change  # type: ignore[return-value]

    outputs = Walk(program, weights_of(model), calls, batches, on_site, {}).run()
    original, compressed = (torch.cat([both[side][0] for both in outputs]) for side in (0, 1))
    return original, compressed, seen


def test_both_sides_equal_the_model_when_nothing_changes() -> None:
    model, x = Late().eval(), torch.randn(10, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    original, compressed, _ = _walk(model, list(x.split(4)))
    with torch.no_grad():
        torch.testing.assert_close(original, model(x))
        torch.testing.assert_close(compressed, model(x))


def test_a_change_at_every_site_reaches_the_compressed_side_alone() -> None:
    model, x = Late().eval(), torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    original, compressed, _ = _walk(model, [x], change=0.25)
    with torch.no_grad():
        branch = model.norm(model.main(x) + 0.25)
        y = F.relu(branch + model.side(x) + 0.25).mean((2, 3))
        expected = model.twice(F.relu(model.twice(y) + 0.25)) + 0.25
        torch.testing.assert_close(compressed, expected)
        torch.testing.assert_close(original, model(x))


def test_a_skip_branch_that_comes_later_is_scheduled_first() -> None:
    model, x = Late().eval(), torch.randn(4, 3, 5, 5)
    _, _, seen = _walk(model, [x])
    assert [arrival.call.path for arrival in seen] == ["side", "main", "twice"]
    main = seen[1]
    assert main.skip is not None
    assert main.call.norm == "norm.running_mean"


def test_a_schedule_holds_every_node_once_and_after_what_it_reads() -> None:
    model = Late().eval()
    sites = find_sites(model, torch.randn(4, 3, 5, 5))
    assert sites.graph.program is not None
    order = schedule(sites.graph.program, sites.in_graph())
    assert sorted(map(str, order)) == sorted(map(str, sites.graph.program.graph.nodes))
    place = {node: i for i, node in enumerate(order)}
    assert all(place[parent] < place[node] for node in order for parent in node.all_input_nodes)


def test_micro_batches_cover_every_sample_once_in_order() -> None:
    x = torch.arange(23.0)[:, None]
    parts = list(micro_batches(iter([x[:10], x[10:]]), 4))
    assert torch.equal(torch.cat([part for part, _ in parts]), x)  # type: ignore[misc]
    assert [row for _, rows in parts for row in rows] == list(range(23))
    assert max(len(rows) for _, rows in parts) <= 4


class Stored(Mapping[str, Tensor]):
    """Tensors of safetensors files, read anew each time they are asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.where: dict[str, Path] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as opened:
                self.where.update(dict.fromkeys(opened.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.where[name]), framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def test_the_original_can_be_walked_from_files(tmp_path: Path) -> None:
    """Shards that are read tensor by tensor give the bits of the modules."""
    model, x = Late().eval(), torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, tmp_path / f"{number}.safetensors")
    stored = Stored(sorted(tmp_path.iterdir()))
    sites, modules = find_sites(model, x), dict(model.named_modules())
    assert sites.graph.program is not None
    walks = [
        Walk(sites.graph.program, weights, sites.in_graph(), [x], lambda arrival: modules[arrival.call.path], {}).run()
        for weights in (weights_of(model), stored)
    ]
    for mine, theirs in zip(*(walk[0] for walk in walks), strict=True):
        assert torch.equal(mine[0], theirs[0])

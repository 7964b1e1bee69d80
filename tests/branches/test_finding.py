"""Branches of a graph, and what can stand in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.reference.branching import LAST, NETWORKS, inputs, made
from torch import Tensor, nn

from rankfold.branches.finding import BranchError, find_branches, first_names
from rankfold.branches.installing import install_stands_
from rankfold.branches.trial import stands_of
from rankfold.sites.finding import find_sites

REFUSED = "in place", "blocks.1.conv2"  # adds a projection of another width in place


def _zeroed(model: nn.Module, name: str) -> nn.Module:
    """A copy whose branch puts out zeros, by hand."""
    result = copy.deepcopy(model)
    last = result.get_submodule(name)
    owner, _, own = name.rpartition(".")
    if own == "conv2":
        last = result.get_submodule(f"{owner}.bn2")
        last.running_mean.zero_()  # type: ignore[operator, union-attr]
        result.get_submodule(name).weight.data.zero_()  # type: ignore[union-attr, operator]
    else:
        last.weight.data.zero_()  # type: ignore[union-attr, operator]
    last.bias.data.zero_()  # type: ignore[union-attr, operator]
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_every_branch_is_found_by_its_last_layer(name: str) -> None:
    model = made(name)
    program = find_sites(model, inputs(name)[0]).graph.program
    assert program is not None
    assert [branch.name for branch in find_branches(program, first_names(model))] == LAST[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_without_a_branch_is_the_model_whose_branch_puts_out_zeros(name: str) -> None:
    model, data = made(name), inputs(name)
    graph = find_sites(model, data[0]).graph
    assert graph.program is not None
    for branch in find_branches(graph.program, first_names(model)):
        if (name, branch.name) == REFUSED:
            continue
        stands = stands_of(model, graph, [branch], data[0])
        small = install_stands_(copy.deepcopy(model), {path: stand for path, (_, stand) in stands.items()})
        with torch.no_grad():
            torch.testing.assert_close(small(data[0]), _zeroed(model, branch.name)(data[0]), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert not hasattr(dict(small.named_modules()).get(branch.name), "weight")


def test_a_block_that_is_left_with_nothing_to_do_goes_whole() -> None:
    for name, branches, whole in (
        ("convolutions", ["blocks.2.conv2"], {"blocks.2"}),
        ("in place", ["blocks.0.conv2"], {"blocks.0"}),
        ("norms before", ["layers.1.attention.out", "layers.1.mlp.2"], {"layers.1"}),
    ):
        model, data = made(name), inputs(name)
        graph = find_sites(model, data[0]).graph
        assert graph.program is not None
        gone = [branch for branch in find_branches(graph.program, first_names(model)) if branch.name in branches]
        stands = stands_of(model, graph, gone, data[0])
        assert set(stands) == whole
        assert {stand.kind for _, stand in stands.values()} == {"bypass"}


def test_code_that_adds_in_place_gets_a_constant_as_large_as_its_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(torch.tanh(self.first(x)))
            y += x
            return torch.tanh(y)

    model, data = InPlace().eval(), torch.randn(4, 3, 5, 5)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    stands = stands_of(model, graph, [branch], data)
    assert stands["second"][1].full
    small = install_stands_(model, {path: stand for path, (_, stand) in stands.items()})
    with torch.no_grad():
        torch.testing.assert_close(small(data), torch.tanh(data))


def test_a_branch_that_must_be_added_in_place_to_another_width_stays() -> None:
    model, data = made(REFUSED[0]), inputs(REFUSED[0])
    graph = find_sites(model, data[0]).graph
    assert graph.program is not None
    with pytest.raises(BranchError, match="expanded size"):
        stands_of(
            model,
            graph,
            [branch for branch in find_branches(graph.program, first_names(model)) if branch.name == REFUSED[1]],
            data[0],
        )


def test_a_branch_whose_sum_broadcasts_is_none() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.head = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.wide(x)
            return self.head(x + self.narrow(x))  # type: ignore[no-any-return]

    model = Broadcast().eval()
    program = find_sites(model, torch.randn(4, 8)).graph.program
    assert program is not None
    assert [branch.name for branch in find_branches(program, first_names(model))] == ["wide"]


def test_code_that_writes_into_what_a_bypass_hands_on_leaves_the_skip_alone() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.mix = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.nn.functional.hardtanh(self.up(x), -2.0, 2.0, inplace=True)
            return torch.tanh(self.mix(x + self.down(h)))

    torch.manual_seed(0)
    model, data = Writes().eval(), torch.randn(8, 8)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    stands = stands_of(model, graph, [branch], data)
    small = install_stands_(copy.deepcopy(model), {path: stand for path, (_, stand) in stands.items()})
    with torch.no_grad():
        torch.testing.assert_close(small(10 * data), torch.tanh(model.mix(10 * data)))


def test_channels_that_lie_on_another_axis_than_the_last_layers_leave_no_constant() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x.movedim(1, -1)))).movedim(-1, 1)  # type: ignore[no-any-return]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Turned()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.branch(x))

    model, data = Block().eval(), torch.randn(4, 8, 8, 8)
    graph = find_sites(model, data).graph
    assert graph.program is not None
    (branch,) = find_branches(graph.program, first_names(model))
    with pytest.raises(BranchError, match="channels"):
        stands_of(model, graph, [branch], data)

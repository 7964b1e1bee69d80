"""The residual branches of a graph, and what dies with some of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from rankfold.graph.nodes import operator_of
from rankfold.graph.regions import ADDS, Call, ancestors, same_shape, tensor_names
from rankfold.layers import layer_operators

STEPS = {  # operators that leave every channel where it is
    *(
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "clamp",
        "dropout",
        "clone",
        "contiguous",
        "alias",
        "getitem",
        "to",
        "_to_copy",
    ),
    *("relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu"),
    *("mish", "softplus", "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm"),
    *("group_norm", "native_group_norm"),
}
VIEWS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze")


class BranchError(Exception):
    """A branch cannot go; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Branch:
    """One operand of an `add`, computed from what the other operand is or was computed from.

    Attributes:
        name: Path of the last layer in it.
        value: Node of the operand.
        skip: Node of the other operand.
        add: Node of the sum.
        channels: Number of channels of the operand; 0 where it is not known which of its axes they are.
        axes: Number of axes behind that of the channels.
    """

    name: str
    value: Node
    skip: Node
    add: Node
    channels: int
    axes: int


def first_names(model: nn.Module) -> dict[str, str]:
    """First path of each module by each of its paths, as sites are named; without the root."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), path)
    return {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False) if path}


def find_branches(program: ExportedProgram, names: Mapping[str, str]) -> list[Branch]:
    """The residual branches, in the order of the graph.

    An operand of a sum is a branch if it multiplies with a weight, reads something that the other operand is or was
    computed from, and takes more weights than the other where both could go. Two branches with one last layer (which is
    called several times) are none.

    Args:
        program: The functional program.
        names: First path of each module by each of its paths, from `first_names`.
    """
    nodes = list(program.graph.nodes)
    owners = {node: owner for node, owner in _owners(program, names).items() if _is_matrix(node)}
    found: list[Branch] = []
    for add in nodes:
        if add.target not in ADDS or len(add.args) != 2 or add.kwargs:
            continue
        operands = [argument for argument in add.args if isinstance(argument, Node)]
        if len(operands) != 2 or operands[0] is operands[1] or not same_shape(*operands):
            continue
        options = []
        for value, skip in (operands, operands[::-1]):
            gone = dying(nodes, [(value, add)])
            weighted = [
                n for n in nodes if n in gone and _multiplies(n) and any(e in owners for e in n.all_input_nodes)
            ]
            if weighted and skip not in gone and _shares_a_source(gone, skip):
                last = next(owners[each] for each in weighted[-1].all_input_nodes if each in owners)
                axes, channels = _channels_of(value, weighted[-1])
                options.append((len(weighted), Branch(last, value, skip, add, channels, axes)))
        if options:
            found.append(max(options, key=lambda option: option[0])[1])
    every = [branch.name for branch in found]
    return [branch for branch in found if every.count(branch.name) == 1]


def _is_matrix(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point()


def _multiplies(node: Node) -> bool:
    """Whether a node is a layer, or a product of matrices."""
    return operator_of(node) in layer_operators() or operator_of(node) in ("addmm", "mm", "matmul", "bmm")


def _owners(program: ExportedProgram, names: Mapping[str, str]) -> dict[Node, str]:
    """First path of the module that holds the tensor behind a node."""
    found = {}
    for node, name in tensor_names(program).items():
        owner = name.rpartition(".")[0]
        found[node] = names.get(owner, owner)
    return found


def _channels_of(value: Node, last: Node) -> tuple[int, int]:
    """Axes behind that of the channels in an operand, and their number.

    They are those of the last layer, as far as nothing in between moves them; else their number is 0.
    """
    axes = last.meta["val"].ndim - 2 if operator_of(last).startswith("conv") else 0
    count = last.meta["val"].shape[-1 - axes]
    node = value
    while node is not last:
        here = [each for each in node.all_input_nodes if each is last or last in ancestors(each)]
        name = operator_of(node)
        stays = name in STEPS or (axes == 0 and _keeps_last(node))
        if len(here) != 1 or not stays or not isinstance(count, int):
            return axes, 0
        node = here[0]
    return axes, count if isinstance(count, int) and value.meta["val"].shape[-1 - axes] == count else 0


def _keeps_last(node: Node) -> bool:
    """Whether an operator that moves elements leaves the last axis as it is."""
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if operator_of(node) in VIEWS:
        return bool(before.shape[-1] == after.shape[-1])
    if operator_of(node) == "transpose":
        return not {axis % before.ndim for axis in node.args[1:3] if isinstance(axis, int)} & {before.ndim - 1}
    order = node.args[1] if operator_of(node) == "permute" else None
    return isinstance(order, (list, tuple)) and order[-1] in (-1, before.ndim - 1)


def layers_in(program: ExportedProgram, branches: Sequence[Branch], names: Mapping[str, str]) -> dict[str, set[str]]:
    """Paths of the modules whose tensors only a branch reads, by name of the branch."""
    nodes = list(program.graph.nodes)
    owners = _owners(program, names)
    found = {}
    for branch in branches:
        gone = dying(nodes, [(branch.value, branch.add)])
        read = {each for node in gone for each in node.all_input_nodes if each in owners}
        found[branch.name] = {owners[each] for each in read if all(user in gone for user in each.users)}
    return found


def without(program: ExportedProgram, gone: Sequence[Branch]) -> tuple[list[Call], set[Node]]:
    """What a walk over the graph needs where some branches go.

    Args:
        program: The functional program.
        gone: The branches.

    Returns:
        A call for each branch that is not inside another, of a layer that reads the skip branch and returns what is
        left of the branch; and the nodes that have no value any more.
    """
    nodes = list(program.graph.nodes)
    dead = dying(nodes, [(branch.value, branch.add) for branch in gone])
    calls = []
    for each in gone:
        if each.add not in dead:
            inside = frozenset(dying(nodes, [(each.value, each.add)]))
            calls.append(Call(each.name, each.skip, each.value, inside, None, each.skip, ()))
    return calls, dead


def dying(nodes: Sequence[Node], ends: Collection[tuple[Node, Node]]) -> set[Node]:
    """The nodes whose values nobody reads any more.

    Args:
        nodes: All nodes, in the order of the graph.
        ends: Operands that go, each with the sum that no longer reads it.
    """
    return _unread(nodes, set(ends)) - _unread(nodes, set())


def _unread(nodes: Sequence[Node], cut: set[tuple[Node, Node]]) -> set[Node]:
    gone: set[Node] = set()
    for node in reversed(nodes):
        if node.op == "call_function" and all(user in gone or (node, user) in cut for user in node.users):
            gone.add(node)
    return gone


def _shares_a_source(gone: set[Node], skip: Node) -> bool:
    """Whether something that dying nodes read is the skip branch, or is computed on the way to it."""
    way = {skip, *ancestors(skip)}
    read = {argument for node in gone for argument in node.all_input_nodes} - gone
    return any(argument in way and (argument is skip or argument.op != "placeholder") for argument in read)

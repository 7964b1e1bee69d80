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
    *("add", "sub", "mul", "div", "neg", "clamp", "dropout", "clone", "contiguous", "alias", "getitem"),
    *("relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu"),
    *("mish", "softplus", "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm"),
    *("group_norm", "native_group_norm", "to", "_to_copy"),
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
    owners = {node: owner for node, owner in _owners(program, names).items() if _is_matrix(node)}
    layers = {}  # path of the layer whose weight a node multiplies with, in the order of the graph
    for node in program.graph.nodes:
        own = next((owners[each] for each in node.all_input_nodes if each in owners), None)
        if own is not None and _multiplies(node):
            layers[node] = own
    unread = unread_in(program)
    found: list[Branch] = []
    for add in program.graph.nodes:
        if add.target not in ADDS or len(add.args) != 2 or add.kwargs:
            continue
        operands = [argument for argument in add.args if isinstance(argument, Node)]
        if len(operands) != 2 or operands[0] is operands[1] or not same_shape(*operands):
            continue
        options = []
        for value, skip in (operands, operands[::-1]):
            gone = dying(unread, [(value, add)])
            inside = [node for node in layers if node in gone]
            if inside and skip not in gone and _shares_a_source(gone, skip):
                axes, channels = _channels_of(value, inside[-1])
                options.append((len(inside), Branch(layers[inside[-1]], value, skip, add, channels, axes)))
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
    owners, unread = _owners(program, names), unread_in(program)
    found = {}
    for branch in branches:
        gone = dying(unread, [(branch.value, branch.add)])
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
    unread = unread_in(program)
    dead = dying(unread, [(branch.value, branch.add) for branch in gone])
    calls = []
    for each in gone:
        if each.add not in dead:
            inside = frozenset(dying(unread, [(each.value, each.add)]))
            calls.append(Call(each.name, each.skip, each.value, inside, None, each.skip, ()))
    return calls, dead


def dying(unread: Collection[Node], ends: Collection[tuple[Node, Node]]) -> set[Node]:
    """The nodes whose values nobody reads any more, found from the ends upwards.

    Args:
        unread: Nodes whose values nobody reads as it is, from `unread_in`.
        ends: Operands that go, each with the sum that no longer reads it.
    """
    cut, gone = set(ends), set[Node]()
    open_ = [value for value, _ in ends]
    while open_:
        node = open_.pop()
        if node in gone or node.op != "call_function":
            continue
        if all(user in gone or user in unread or (node, user) in cut for user in node.users):
            gone.add(node)
            open_ += node.all_input_nodes  # looked at again with each of its users
    return gone


def unread_in(program: ExportedProgram) -> set[Node]:
    """The nodes of a graph whose values nobody reads: checks, and items of tuples that are not used."""
    found: set[Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and all(user in found for user in node.users):
            found.add(node)
    return found


def _shares_a_source(gone: set[Node], skip: Node) -> bool:
    """Whether something that dying nodes read is the skip branch, or is computed on the way to it."""
    way = {skip, *ancestors(skip)}
    read = {argument for node in gone for argument in node.all_input_nodes} - gone
    return any(argument in way and (argument is skip or argument.op != "placeholder") for argument in read)

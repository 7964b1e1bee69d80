"""Branches that go → the modules that something else can stand for, found on the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.export import ExportedProgram
from torch.fx import Node

from rankfold.branches.finding import Branch, BranchError, dying, unread_in
from rankfold.branches.installing import below
from rankfold.graph.nodes import has_tensors, operator_of
from rankfold.graph.regions import SAME_VALUE, same_shape

NEVER_NEGATIVE = ("relu", "relu6", "sigmoid", "softmax", "exp", "square", "abs")
POOLS = ("max_pool2d", "max_pool1d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")


@dataclass(eq=False)
class Places:
    """Modules that die, or that only hand a value on, when some branches go.

    Attributes:
        bypasses: Paths of modules whose outputs nobody reads any more, or whose output is their input.
        idle: Those among them whose output is their input.
        constants: Path of the module that each branch ends in, by name of the branch; branches that end in a module
            that hands a value on have none.
    """

    bypasses: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    constants: dict[str, str] = field(default_factory=dict)

    def holds(self, path: str) -> bool:
        """Whether a module is one of those that something stands for, or below one."""
        return below(path, (*self.bypasses, *self.constants.values()))


def places_of_stands(
    program: ExportedProgram, gone: Sequence[Branch], modules: Mapping[str, str], *, whole: bool = True
) -> Places:
    """The largest modules that something can stand for when some branches go.

    A module whose every value is dead is never needed. A module that holds a sum whose branch went may be left with
    nothing to do but to hand its input on (a ReLU of what no longer can be negative does nothing), and goes whole, with
    all time that it took. Else the branch ends in a constant: at the module whose output the branch is.

    Args:
        program: The functional program.
        gone: The branches.
        modules: First path of each of the model's modules, by each of its paths.
        whole: False if no module that is left with nothing to do goes whole.

    Raises:
        BranchError: A branch does not end in a module of its own, or one that is called elsewhere too.
    """
    removed = {branch.add: branch for branch in gone}
    unread = unread_in(program)
    dead = dying(unread, [(branch.value, branch.add) for branch in gone]) | unread
    found = Places()
    passed: set[Node] = set()  # sums inside modules that hand their input on
    never: list[str] = []  # modules whose every value is dead
    own = _nodes_by_module(program.graph.nodes, modules)
    for path in sorted(own, key=lambda path: path.count(".")):
        if found.holds(path):
            continue
        inside = own[path]
        live = [node for node in inside if node not in dead and has_tensors(node)]
        if not live:
            found.bypasses.append(path)
            never.append(path)
        elif whole and any(node in removed for node in live) and _hands_on(inside, live, removed):
            found.bypasses.append(path)
            found.idle.append(path)
            passed.update(node for node in live if node in removed)
    for add, branch in removed.items():
        if add in dead or add in passed:
            continue
        path, node = _ends_in(branch.value, never, own)
        if any(user not in own[path] and user is not add and user not in dead for user in node.users):
            raise BranchError("what the branch ends in is read elsewhere too")
        if len(_calls_of(path, own[path], modules)) > 1:
            raise BranchError(f"{path} is called several times")
        found.bypasses.remove(path)
        found.constants[branch.name] = path
    return found


def _ends_in(value: Node, dead: Sequence[str], own: Mapping[str, set[Node]]) -> tuple[str, Node]:
    """The dead module whose output a branch is, and that output."""
    node = value
    while True:
        path = next((path for path in dead if node in own[path]), None)
        if path is not None:
            return path, node
        if not _same(node) or len(node.users) > 1:
            raise BranchError("the branch does not end in a module of its own, but in code of the module around it")
        node = node.all_input_nodes[0]


def _same(node: Node) -> bool:
    """Whether a node's value is that of its argument, for the same shape."""
    return node.op == "call_function" and (node.target in SAME_VALUE or operator_of(node) == "getitem")


def _hands_on(inside: set[Node], live: Sequence[Node], removed: Mapping[Node, Branch]) -> bool:
    """Whether what is left of a module hands one of its inputs on.

    Args:
        inside: All nodes of the module.
        live: Those that are not dead, in any order.
        removed: Sums that have lost an operand, with the branch.
    """
    ends = [node for node in live if any(user not in inside for user in node.users)]
    if len(ends) != 1:
        return False
    node, chain = ends[0], set()
    while node in inside:
        chain.add(node)
        if node in removed:
            node = removed[node].skip
        elif _does_nothing(node, removed):
            node = node.all_input_nodes[0]
        else:
            return False
    return node.op == "call_function" and same_shape(node, ends[0]) and all(each in chain for each in live)


def _does_nothing(node: Node, removed: Mapping[Node, Branch]) -> bool:
    """Whether a step returns its argument: a copy, or a ReLU of what is never negative."""
    relu = operator_of(node) == "relu" and _never_negative(node.all_input_nodes[0], removed)
    return node.target in SAME_VALUE or relu


def _never_negative(node: Node, removed: Mapping[Node, Branch]) -> bool:
    """Whether a value has no negative entry, by the operator that made it."""
    while node.op == "call_function":
        name = operator_of(node)
        if node in removed:
            node = removed[node].skip
        elif name in NEVER_NEGATIVE:
            return True
        elif node.target in SAME_VALUE or name in POOLS:
            node = node.all_input_nodes[0]
        else:
            return False
    return False


def _nodes_by_module(nodes: Iterable[Node], modules: Mapping[str, str]) -> dict[str, set[Node]]:
    """The nodes that the code of each module, and of those below it, makes."""
    own: dict[str, set[Node]] = {}
    for node in nodes:
        if node.op == "call_function":
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                name = modules.get(re.sub(r"@\d+", "", path), "")
                if name:
                    own.setdefault(name, set()).add(node)
    return own


def _calls_of(path: str, nodes: set[Node], modules: Mapping[str, str]) -> set[str]:
    """The calls of a module by the names that the graph gives them."""
    full = {entry for node in nodes for entry, _ in (node.meta.get("nn_module_stack") or {}).values()}
    return {entry for entry in full if modules.get(re.sub(r"@\d+", "", entry)) == path}

"""Place of a site's layer in the graph, and the steps that its output takes before it meets a residual `add`."""

from __future__ import annotations

import operator as python_operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from rankfold.graph.nodes import operator_of
from rankfold.layers import Operator, layer_operators

aten = torch.ops.aten
_FUSED_NORM = aten._native_batch_norm_legit_no_training.default  # batch_norm after a decomposition
SAME_VALUE = (aten.clone.default, aten.dropout.default, aten.contiguous.default, aten.alias.default)
ADDS = (aten.add.Tensor, python_operator.add)
TABLE = "embedding"  # the operator that looks rows up


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a site's layer.

    Attributes:
        path: Path of the site.
        entry: Node whose value is the layer's input.
        exit: Node whose value is the layer's output.
        inside: Nodes of the layer's own code, `exit` included.
        norm: Name of the running mean of a batch norm that alone reads the output and can absorb a bias; None if none.
        skip: The other operand of the residual `add` that the output reaches through per-channel affine steps alone.
        scale_nodes: Nodes of those steps, in order.
    """

    path: str
    entry: Node
    exit: Node
    inside: frozenset[Node]
    norm: str | None
    skip: Node | None
    scale_nodes: tuple[Node, ...]


def find_calls(
    program: ExportedProgram, known: Mapping[str, str], heads: Mapping[str, str] | None = None
) -> list[Call]:
    """Every call of every site's layer, in the order of the graph.

    Args:
        program: The functional program.
        known: Paths of the sites by each of their names; calls of other layers are left out.
        heads: Paths of the linear layers that multiply with a site's table, by path of the site; None is no such.
    """
    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters}
    buffers = {**signature.inputs_to_buffers}
    calls = []
    for node in program.graph.nodes:
        operator = _layer_operator(node)
        if operator is None:
            continue
        # The weight identifies the layer: a module that is called under another name can have a wrong path.
        owner = parameters.get(_name(node.args[operator.weight]), "").rpartition(".")[0]
        if owner in known:
            path = known[owner]
            if operator.name != TABLE:  # one tensor has one name, whoever reads it
                path = (heads or {}).get(path, path)
            calls.append(_call(node, path, module_path(node), operator, buffers))
    return [call if call.norm is None or _absorbs(call, calls) else replace(call, norm=None) for call in calls]


def readers_of(program: ExportedProgram) -> dict[str, set[str]]:
    """Names of the operators of layer kinds that read each parameter as their weight, by its name."""
    names = tensor_names(program)
    readers: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        operator = _layer_operator(node)
        weight = None if operator is None else node.args[operator.weight]
        if operator is not None and weight in names:
            readers.setdefault(names[weight], set()).add(operator.name)
    return readers


def _layer_operator(node: Node) -> Operator | None:
    """The operator of a layer kind, if a node is one; None otherwise."""
    return layer_operators().get(operator_of(node)) if node.op == "call_function" else None


def _absorbs(call: Call, calls: Sequence[Call]) -> bool:
    """Whether the norm behind a call can take up a bias of its layer: it is behind all calls of that layer, and behind
    those alone.
    """
    own = [other for other in calls if other.path == call.path]
    if any(other.norm != call.norm for other in own):
        return False
    (norm,) = call.exit.users
    mean = norm.args[3]
    exits = {other.exit for other in own}
    return isinstance(mean, Node) and all(is_batch_norm(user) and user.args[0] in exits for user in mean.users)


def _call(node: Node, site: str, path: str, operator: Operator, buffers: dict[str, str]) -> Call:
    inside = {node}
    entry = node.args[operator.data]
    while isinstance(entry, Node) and entry.op == "call_function" and module_path(entry) == path:
        if _layer_operator(entry) is not None or len(entry.users) > 1:
            break
        inside.add(entry)
        entry = next(arg for arg in entry.args if isinstance(arg, Node))
    exit_node = node
    while len(exit_node.users) == 1:
        (user,) = exit_node.users
        if module_path(user) != path or _layer_operator(user) is not None or user.op != "call_function":
            break
        exit_node = user
        inside.add(user)
    if not isinstance(entry, Node):
        raise TypeError(f"{site} has no input node")
    norm = None
    if len(exit_node.users) == 1:
        (user,) = exit_node.users
        if is_batch_norm(user) and user.args[0] is exit_node and _channels_are_axis_1(exit_node, node, operator):
            norm = buffers.get(_name(user.args[3]))
    skip, steps = _residual(exit_node)
    return Call(site, entry, exit_node, frozenset(inside), norm, skip, steps)


def _channels_are_axis_1(exit_node: Node, layer: Node, operator: Operator) -> bool:
    """Whether axis 1 of a layer's output, the channel axis of batch norms, is the axis of its output channels."""
    value = exit_node.meta.get("val")
    axes = 2 if operator.axis == -1 else layer.args[operator.weight].meta["val"].ndim  # type: ignore[union-attr]
    return isinstance(value, Tensor) and value.ndim == axes


def _residual(start: Node) -> tuple[Node | None, tuple[Node, ...]]:
    """Follow per-channel affine steps from a node to an `add`; the other operand, and the steps."""
    steps: list[Node] = []
    here = start
    while len(here.users) == 1:
        (user,) = here.users
        if user.target in ADDS and len(user.args) == 2 and not user.kwargs:
            others = [arg for arg in user.args if arg is not here]
            if len(others) == 1 and isinstance(others[0], Node) and same_shape(others[0], start):
                return others[0], tuple(steps)
            return None, ()
        norm = is_batch_norm(user) and user.args[0] is here
        scaled = user.target in (aten.mul.Tensor, python_operator.mul) and is_channel_scale(user, here)
        through = user.target in SAME_VALUE or (user.target is python_operator.getitem and user.args[1] == 0)
        if not (norm or scaled or through) or (scaled and not same_shape(user, start)):
            return None, ()
        if norm or scaled:
            steps.append(user)
        here = user
    return None, ()


def is_channel_scale(node: Node, here: Node) -> bool:
    """Whether a product's other operand is a parameter (layer scale) that broadcasts over samples and positions."""
    others = [arg for arg in node.args if arg is not here]
    if len(others) != 1 or not isinstance(others[0], Node) or others[0].op != "placeholder":
        return False
    value = others[0].meta.get("val")
    return isinstance(value, Tensor) and value.ndim <= 3 and others[0].name.startswith(("p_", "b_", "c_"))


def channel_scale(call: Call, shape: torch.Size, value_of: Callable[[Node], Any]) -> Tensor | None:
    """The factor `a` by which the steps between a layer and its residual `add` scale each channel.

    Args:
        call: Call with its `scale_nodes`.
        shape: Shape of the layer's output.
        value_of: Function that returns the tensor of a parameter or buffer node.

    Returns:
        A tensor that broadcasts against the output, or None for a factor of 1.
    """
    scale: Tensor | None = None
    for node in call.scale_nodes:
        if is_batch_norm(node):
            weight, variance, eps = node.args[1], node.args[4], _batch_norm_eps(node)
            step = (value_of(variance).double() + eps).rsqrt()  # type: ignore[arg-type]
            if weight is not None:
                step = step * value_of(weight).double()  # type: ignore[arg-type]
            step = step.reshape(-1, *[1] * (len(shape) - 2))
        else:
            other = next(arg for arg in node.args if isinstance(arg, Node) and arg.op == "placeholder")
            step = value_of(other).double()
        scale = step if scale is None else scale * step
    return scale


def is_batch_norm(node: Node) -> bool:
    """Whether a node is a batch norm with running moments."""
    return node.target is _FUSED_NORM or (node.target is aten.batch_norm.default and not node.args[5])


def _batch_norm_eps(node: Node) -> Any:
    return node.args[6 if node.target is _FUSED_NORM else 7]


def same_shape(first: Node, second: Node) -> bool:
    """Whether the values of two nodes are tensors of one shape, for any size of the batch."""
    a, b = first.meta.get("val"), second.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and len(a.shape) == len(b.shape)
        and (all(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)))
    )


def module_path(node: Node) -> str:
    """Path of the innermost module whose code makes a node; "" where the graph names none."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def _name(argument: Any) -> str:
    return argument.name if isinstance(argument, Node) else ""


def tensor_names(program: ExportedProgram) -> dict[Node, str]:
    """Placeholder nodes of parameters, buffers and constants, and the names of those."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    targets = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }
    return {
        node: targets[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.name in targets
    }


def schedule(program: ExportedProgram, calls: list[Call]) -> list[Node]:
    """The nodes in an order in which a layer's skip branch is computed before the layer wherever that is possible.

    Each skip operand that does not itself depend on the layer's output is moved, with what it needs, before the
    layer's entry; everything else keeps the order of the graph.
    """
    nodes = list(program.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    before: dict[Node, Node] = {}
    for call in calls:
        if call.skip is None or index[call.skip] < index[call.exit]:
            continue
        if call.exit not in ancestors(call.skip):
            before[min(call.inside, key=index.__getitem__)] = call.skip
    order: list[Node] = []
    placed: set[Node] = set()

    def place(root: Node) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            needs = [n for n in node.all_input_nodes if n not in placed]
            first = before.get(node)
            if first is not None and first not in placed:
                needs.append(first)
            if node in placed or not needs:
                if node not in placed:
                    placed.add(node)
                    order.append(node)
                stack.pop()
            else:
                stack.extend(sorted(needs, key=index.__getitem__, reverse=True))

    for node in nodes:
        place(node)
    return order


def ancestors(node: Node) -> set[Node]:
    """The nodes that a node is computed from, directly or not."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen

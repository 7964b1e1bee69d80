"""One walk over the graph with two networks side by side: the original, and the one that is being compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree

from rankfold.graph.regions import Call, schedule
from rankfold.graph.trace import Batch, split_batch

Values: TypeAlias = list[Any]  # one entry a micro-batch


@dataclass(eq=False)
class Pair:
    """A node's value in both networks, a list with one entry a micro-batch.

    Attributes:
        original: In the original.
        compressed: In the compressed network; the same list object while nothing before it was changed.
    """

    original: Values
    compressed: Values

    @property
    def same(self) -> bool:
        """Whether the two networks still agree here."""
        return self.compressed is self.original


@dataclass(eq=False)
class Arrival:
    """What the walk knows when it stands before a site's layer.

    Attributes:
        call: The call.
        inputs: The layer's inputs in both networks.
        outputs: The original's outputs.
        skip: The skip branch in both networks where the output goes into a residual `add` and the branch is known
            already; None otherwise.
        tensor: Gives the original's parameter or buffer behind a node.
    """

    call: Call
    inputs: Pair
    outputs: Values
    skip: Pair | None
    tensor: Callable[[Node], Tensor]


OnSite: TypeAlias = Callable[[Arrival], nn.Module]


class Walk:
    """The interpreter. It holds every live value of both networks, and frees each after its last use.

    Args:
        program: The functional program.
        model: The original; parameters are fetched from it by name when their node is reached.
        calls: Calls of the sites to solve, from `find_calls`.
        batches: The calibration set in micro-batches.
        on_site: Called once at every site; returns the layer that takes its place in the compressed network.
        overrides: Tensors of the compressed network by name, where they differ from the original's; `on_site` may add
            to it.
    """

    def __init__(
        self,
        program: ExportedProgram,
        model: nn.Module,
        calls: Sequence[Call],
        batches: Sequence[Batch],
        on_site: OnSite,
        overrides: dict[str, Tensor],
    ) -> None:
        self._program = program
        self._calls = {call.exit: call for call in calls}
        self._inside = {node: call for call in calls for node in call.inside}
        self._on_site = on_site
        self._overrides = overrides
        self._batches = batches
        self._tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._order = schedule(program, list(calls))
        self._layers: dict[str, nn.Module] = {}
        self._live: dict[Node, Pair] = {}
        self._names = _tensor_names(program)

    def run(self) -> Pair:
        """Walk the whole graph.

        Returns:
            The outputs of both networks, as the program returns them (flat).
        """
        last = self._last_uses()
        output: Pair | None = None
        with torch.no_grad():
            inputs = self._user_inputs()
            for step, node in enumerate(self._order):
                if node.op == "placeholder":
                    if node in inputs:
                        self._live[node] = inputs[node]
                elif node.op == "output":
                    output = self._evaluate(node, lambda args, kwargs: args[0])
                elif node in self._calls:
                    self._live[node] = self._site(node)
                elif node.op == "call_function":
                    self._live[node] = self._evaluate(node, _calling(node.target))
                elif node.op == "get_attr":
                    value = _attribute(self._program.graph_module, str(node.target))
                    same = [value] * len(self._batches)
                    self._live[node] = Pair(same, same)
                for dead in last.get(step, ()):
                    self._live.pop(dead, None)
        if output is None:
            raise RuntimeError("the program has no output node")
        return output

    def _site(self, node: Node) -> Pair:
        """Compute the original's output, have the site solved at its first call, and run the new layer."""
        call = self._calls[node]
        original = self._evaluate(node, _calling(node.target), only_original=True).original
        inputs = self._live[call.entry]
        if call.path not in self._layers:
            skip = self._live.get(call.skip) if call.skip is not None else None
            arrival = Arrival(call, inputs, original, skip, self._tensor)
            self._layers[call.path] = self._on_site(arrival)
        layer = self._layers[call.path]
        return Pair(original, [layer(value) for value in inputs.compressed])

    def _evaluate(self, node: Node, function: Callable[[Any, Any], Any], *, only_original: bool = False) -> Pair:
        inside = node in self._inside and node not in self._calls
        read = [self._live[arg] for arg in node.all_input_nodes if arg in self._live]
        touched = any(not pair.same for pair in read) or any(
            self._names.get(arg) in self._overrides for arg in node.all_input_nodes
        )
        original = [function(*self._arguments(node, i, compressed=False)) for i in range(len(self._batches))]
        if not touched or only_original or inside:
            return Pair(original, original)
        return Pair(original, [function(*self._arguments(node, i, compressed=True)) for i in range(len(self._batches))])

    def _arguments(self, node: Node, index: int, *, compressed: bool) -> tuple[Any, Any]:
        def value(argument: Node) -> Any:
            pair = self._live.get(argument)
            if pair is not None:
                return (pair.compressed if compressed else pair.original)[index]
            name = self._names[argument]
            if compressed and name in self._overrides:
                return self._overrides[name]
            return self._tensor(argument)

        args: Any = torch.fx.node.map_arg(node.args, value)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, value)
        return args, kwargs

    def _tensor(self, node: Node) -> Tensor:
        name = self._names[node]
        if name in self._tensors:
            return self._tensors[name]
        constant: Tensor = self._program.constants[name]
        return constant

    def _user_inputs(self) -> dict[Node, Pair]:
        names = list(self._program.graph_signature.user_inputs)
        nodes = {node.name: node for node in self._program.graph.nodes if node.op == "placeholder"}
        leaves = [_pytree.tree_leaves(split_batch(batch)) for batch in self._batches]
        result = {}
        for position, name in enumerate(names):
            if isinstance(name, str) and name in nodes:
                values = [leaf[position] for leaf in leaves]
                result[nodes[name]] = Pair(values, values)
        return result

    def _last_uses(self) -> dict[int, list[Node]]:
        """For every step the nodes whose value is not read after it."""
        at: dict[Node, int] = {}
        for step, node in enumerate(self._order):
            at[node] = step
            for argument in node.all_input_nodes:
                at[argument] = step
            call = self._calls.get(node)
            if call is not None:
                at[call.entry] = step
                if call.skip is not None and call.skip in at:
                    at[call.skip] = max(at[call.skip], step)
        dead: dict[int, list[Node]] = {}
        for node, step in at.items():
            dead.setdefault(step, []).append(node)
        return dead


def _tensor_names(program: ExportedProgram) -> dict[Node, str]:
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


def _calling(target: Any) -> Callable[[Any, Any], Any]:
    """An operator as a function of (args, kwargs)."""
    return lambda args, kwargs: target(*args, **kwargs)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def micro_batches(batches: Iterator[Batch], size: int) -> Iterator[tuple[Batch, range]]:
    """Batches cut into near-equal parts of at most `size` samples, with the positions of their samples in the data."""
    from rankfold.graph.trace import batch_size, take

    start = 0
    for batch in batches:
        whole = batch_size(batch)
        parts = -(-whole // size)
        for chunk in torch.arange(whole).chunk(parts):
            yield take(batch, chunk), range(start + int(chunk[0]), start + int(chunk[-1]) + 1)
        start += whole

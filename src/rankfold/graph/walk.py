"""One walk over the graph with two networks side by side: the original, and the one that is being compressed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree

from rankfold.data.batches import Batch, split_batch
from rankfold.graph.regions import Call, schedule, tensor_names
from rankfold.graph.spill import Spill, Values


@dataclass(eq=False)
class Pair:
    """A node's value in both networks, one entry per micro-batch.

    Attributes:
        original: Values in the original.
        compressed: Values in the compressed network; the same object while nothing before the node was changed.
    """

    original: Values
    compressed: Values

    @property
    def same(self) -> bool:
        """Whether the two networks still agree here."""
        return self.compressed is self.original


@dataclass(eq=False)
class Arrival:
    """State of the walk before a site's layer.

    Attributes:
        call: The call.
        inputs: The layer's inputs in both networks.
        outputs: The original's outputs.
        skip: The skip branch in both networks where the output goes into a residual `add` and the branch is known
            already; None otherwise.
        tensor: Function that returns the original's parameter or buffer behind a node.
    """

    call: Call
    inputs: Pair
    outputs: Values
    skip: Pair | None
    tensor: Callable[[Node], Tensor]


OnSite: TypeAlias = Callable[[Arrival], nn.Module]
Weights: TypeAlias = Mapping[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """The parameters and buffers of a model under all their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


class Walk:
    """The interpreter. It keeps the values of both networks that are live at a site, and frees each after its last use.

    From one site to the next every micro-batch is walked on its own, so that values used only in between exist for
    one micro-batch at a time.

    Args:
        program: The functional program.
        weights: Tensors of the original by name; each is fetched when its node is reached.
        calls: Calls of the sites to solve, from `find_calls`.
        batches: The calibration set in micro-batches.
        on_site: Function called once at every site; returns the layer for the compressed network.
        overrides: Tensors of the compressed network by name, where they differ from the original's; `on_site` may add
            to it.
        spill: Store of the values; None keeps all of them in memory.
        dead: Nodes that have no value in the compressed network, beside those inside the calls.
    """

    def __init__(
        self,
        program: ExportedProgram,
        weights: Weights,
        calls: Sequence[Call],
        batches: Sequence[Batch],
        on_site: OnSite,
        overrides: dict[str, Tensor],
        spill: Spill | None = None,
        dead: Collection[Node] = (),
    ) -> None:
        self._program = program
        self._calls = {call.exit: call for call in calls}
        self._inside = {node for call in calls for node in call.inside}.union(dead)
        self._on_site = on_site
        self._overrides = overrides
        self._batches = batches
        self._spill = Spill() if spill is None else spill
        self._weights = weights
        self._own: dict[str, Tensor] = {}  # what the original held where an override may be written into it
        self._order = schedule(program, list(calls))
        self._layers: dict[str, nn.Module] = {}
        self._live: dict[Node, Pair] = {}
        self._names = tensor_names(program)

    @property
    def parts(self) -> int:
        """Number of micro-batches."""
        return len(self._batches)

    def run(self) -> Returned:
        """Walk the whole graph up to the last site; the part after it is walked when its outputs are read.

        Returns:
            The outputs of both networks.
        """
        last = self._last_uses()
        output = next((node for node in self._order if node.op == "output"), None)
        if output is None:
            raise RuntimeError("the program has no output node")
        last[output] = len(self._order)
        start, site = 0, None
        with torch.no_grad():
            self._live.update(self._user_inputs())
            for step, node in enumerate(self._order):
                if node not in self._calls:
                    continue
                self._stretch(self._piece(start, step + 1, site, last))
                start, site = step + 1, node
                self._solve(self._calls[node])
                for dead in [each for each in self._live if last[each] <= step]:
                    del self._live[dead]
                self._spill.tidy()
        for name in self._overrides.keys() & self._weights.keys():
            self._own[name] = self._weights[name].clone()
        return Returned(self, self._piece(start, self._order.index(output) + 1, site, last), output)

    def _solve(self, call: Call) -> None:
        """Solve a site at its first call."""
        if call.path in self._layers:
            return
        skip = self._live.get(call.skip) if call.skip is not None else None
        arrival = Arrival(call, self._entry(call), self._live[call.exit].original, skip, self._tensor)
        self._layers[call.path] = self._on_site(arrival)

    def _entry(self, call: Call) -> Pair:
        """A layer's inputs; a parameter is the same for every micro-batch."""
        if call.entry in self._live:
            return self._live[call.entry]
        values = Spill().values([self._tensor(call.entry)] * len(self._batches))
        return Pair(values, values)

    def _piece(self, start: int, stop: int, site: Node | None, last: dict[Node, int]) -> _Piece:
        """The steps from one site to the next, or to the outputs.

        Args:
            start: First step of the order.
            stop: The step after the last: after the next site, or the output.
            site: The site before, whose new layer is run first; None at the start.
            last: Step of the last use of every node.
        """
        nodes = [node for node in self._order[start:stop] if self._is_computed(node)]
        changed = self._changed(nodes, site)
        end = self._calls.get(self._order[stop - 1])
        asked = set() if end is None else {end.entry, end.exit, end.skip}
        computed = {*nodes, *([] if site is None else [site])}
        kept = {node for node in computed if last[node] >= stop or node in asked}
        dying = [node for node in self._live if last[node] < stop and node not in asked]
        return _Piece(range(start, stop), site, computed, changed, kept, dying, last)

    def _stretch(self, piece: _Piece) -> None:
        """Walk from one site to the next, micro-batch by micro-batch."""
        originals = {node: self._spill.values() for node in piece.kept if node is not piece.site}
        compressed = {node: self._spill.values() for node in piece.kept & piece.changed}
        for index in range(len(self._batches)):
            here = self.walked(piece, index)
            for node, values in originals.items():
                values.append(here[node][0])
            for node, values in compressed.items():
                values.append(here[node][1])
            for node in piece.dying:
                self._live[node].original.release(index)
                self._live[node].compressed.release(index)
        for node in piece.kept:
            original = self._live[node].original if node is piece.site else originals[node]
            self._live[node] = Pair(original, compressed.get(node, original))

    def walked(self, piece: _Piece, index: int) -> dict[Node, tuple[Any, Any]]:
        """The values in both networks that are kept of a piece, for one micro-batch."""
        here: dict[Node, tuple[Any, Any]] = {}
        if piece.site is not None:
            here[piece.site] = self._installed(piece.site, index)
        for step in piece.steps:
            node = self._order[step]
            if node not in piece.computed:
                continue
            here[node] = self._both(node, index, here, both=node in piece.changed)
            for argument in {node, *node.all_input_nodes} - piece.kept:
                if piece.last.get(argument, -1) == step:
                    here.pop(argument, None)
        return here

    def _is_computed(self, node: Node) -> bool:
        return node.op in ("output", "call_function", "get_attr") and node not in self._live

    def _changed(self, nodes: Sequence[Node], site: Node | None) -> set[Node]:
        """The nodes, among these and the site before them, whose value differs in the compressed network."""
        changed = set() if site is None else {site}
        for node in nodes:
            if node in self._inside:
                continue
            for argument in node.all_input_nodes:
                pair = self._live.get(argument)
                stored = pair is not None and argument is not site and not pair.same
                if stored or argument in changed or self._names.get(argument) in self._overrides:
                    changed.add(node)
        return changed

    def _installed(self, site: Node, index: int) -> tuple[Any, Any]:
        """A solved site's output in both networks."""
        call = self._calls[site]
        return self._live[site].original[index], self._layers[call.path](self._entry(call).compressed[index])

    def _both(self, node: Node, index: int, here: dict[Node, tuple[Any, Any]], *, both: bool) -> tuple[Any, Any]:
        """A node's value in both networks; the same object where the two do not differ."""
        for argument in node.all_input_nodes:
            pair = self._live.get(argument)
            if pair is not None and argument not in here:
                value = pair.original[index]
                here[argument] = value, value if pair.same else pair.compressed[index]
        if node.op == "get_attr":
            value = _attribute(self._program.graph_module, str(node.target))
            return value, value
        function = self._returned if node.op == "output" else _calling(node.target)
        original = function(*self._arguments(node, here, compressed=False))
        return original, function(*self._arguments(node, here, compressed=True)) if both else original

    def _arguments(self, node: Node, here: dict[Node, tuple[Any, Any]], *, compressed: bool) -> tuple[Any, Any]:
        def value(argument: Node) -> Any:
            if argument in here:
                return here[argument][1 if compressed else 0]
            name = self._names[argument]
            if compressed and name in self._overrides:
                return self._overrides[name]
            return self._tensor(argument)

        args: Any = torch.fx.node.map_arg(node.args, value)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, value)
        return args, kwargs

    def _returned(self, args: Any, kwargs: Any) -> Any:
        """The model's outputs: the output node also holds new values of buffers and inputs it writes into."""
        specs = self._program.graph_signature.output_specs
        return tuple(value for value, spec in zip(args[0], specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT)

    def _tensor(self, node: Node) -> Tensor:
        name = self._names[node]
        if name in self._own:
            return self._own[name]
        if name in self._weights:
            return self._weights[name]
        constant: Tensor = self._program.constants[name]
        return constant

    def _user_inputs(self) -> dict[Node, Pair]:
        names = list(self._program.graph_signature.user_inputs)
        nodes = {node.name: node for node in self._program.graph.nodes if node.op == "placeholder"}
        leaves = [_pytree.tree_leaves(split_batch(batch)) for batch in self._batches]
        result = {}
        for position, name in enumerate(names):
            if isinstance(name, str) and name in nodes:
                values = Spill().values(leaf[position] for leaf in leaves)  # the caller's own: no limit applies
                result[nodes[name]] = Pair(values, values)
        return result

    def _last_uses(self) -> dict[Node, int]:
        """The step of the last use of every node; a site's input is used by its new layer, one step after it."""
        at: dict[Node, int] = {}
        for step, node in enumerate(self._order):
            at[node] = max(at.get(node, step), step)
            for argument in node.all_input_nodes:
                at[argument] = max(at[argument], step)
            call = self._calls.get(node)
            if call is not None:
                at[call.entry] = max(at[call.entry], step + 1)
                if call.skip is not None and call.skip in at:
                    at[call.skip] = max(at[call.skip], step)
        return at


@dataclass(frozen=True, eq=False)
class _Piece:
    """Steps of the walk between two sites.

    Attributes:
        steps: Indices of the steps in the walk's order.
        site: The site before; None at the start.
        computed: Nodes that get a value here.
        changed: Nodes whose value differs in the compressed network.
        kept: Nodes whose value is used afterwards.
        dying: Nodes of earlier pieces whose value is not used afterwards.
        last: Step of the last use of every node.
    """

    steps: range
    site: Node | None
    computed: set[Node]
    changed: set[Node]
    kept: set[Node]
    dying: list[Node]
    last: dict[Node, int]


class Returned(Sequence[tuple[Any, Any]]):
    """Outputs of the original and the compressed network, flat as the program's, one entry per micro-batch.

    An entry is computed from the last site on when it is read, so that outputs, which may be larger than all other
    values, are in memory for one micro-batch at a time.
    """

    def __init__(self, walk: Walk, piece: _Piece, output: Node) -> None:
        self._walk, self._piece, self._output = walk, piece, output

    def __len__(self) -> int:
        """Number of micro-batches."""
        return self._walk.parts

    @overload
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, Any]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, Any] | Sequence[tuple[Any, Any]]:
        """The outputs of a micro-batch, (original's, compressed network's)."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        with torch.no_grad():
            return self._walk.walked(self._piece, index)[self._output]


def _calling(target: Any) -> Callable[[Any, Any], Any]:
    """An operator as a function of (args, kwargs)."""
    return lambda args, kwargs: target(*args, **kwargs)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module

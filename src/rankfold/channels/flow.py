"""Where each channel goes: coordinates that flow through the exported graph.

Every layer that makes channels gives them numbers. A value's numbers are a tensor that broadcasts against the value:
operators that only move elements are run on the numbers themselves, operators that combine element by element unite
what meets, and an operator that is not known freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from rankfold.channels.coordinates import STAYS, Flow, along, broadcast, compressed, spread
from rankfold.channels.operators import (
    BATCH_NORMS,
    CONSTANT,
    ELEMENTWISE,
    LAYOUT,
    REDUCTIONS,
    SOFTMAX,
    SPATIAL,
    flat_sources,
    one_slope,
)
from rankfold.graph.nodes import (
    argument_of,
    has_tensors,
    is_cast,
    is_tensor,
    number_of,
    operator_of,
    place_of,
    shape_of,
)
from rankfold.graph.regions import tensor_names
from rankfold.layers import Operator, layer_operators

TIED = "tied: the table of an embedding is the weight of a head"


def follow(program: ExportedProgram, layers: dict[str, str], left: Mapping[str, str]) -> Flow:
    """Let channels flow through a graph.

    Args:
        program: The functional program.
        layers: Path of the site by the name of its weight parameter; other layers freeze what they read.
        left: Reason why a layer is left alone, by the name of its weight parameter.
    """
    walk = _Walk(program, layers, left)
    for node in program.graph.nodes:
        walk.step(node)
    walk.finish()
    return walk.flow


class _Walk:
    """The walk. The numbers of a node's value are a tensor that broadcasts against it, a list of such, or None."""

    def __init__(self, program: ExportedProgram, layers: dict[str, str], left: Mapping[str, str]) -> None:
        self.flow = Flow()
        self._layers, self._left = layers, left
        self._names, self._operators = tensor_names(program), layer_operators()
        self._numbers: dict[Node, Any] = {}
        self._blind: set[str] = set()  # layers that were called on an input that is not followed
        self._values: set[str] = set()  # tensors that an operator other than their layer or norm reads
        self._flat: dict[Node, Tensor] = {}  # numbers of heads that constants were made for

    def step(self, node: Node) -> None:
        """Follow channels through one node."""
        if node.op == "output":
            for argument in node.all_input_nodes:
                self._freeze_all(argument, "it is in the output of the model")
        if node.op != "call_function" or not has_tensors(node):
            return
        name = operator_of(node)
        inputs = [argument for argument in node.all_input_nodes if self._numbers.get(argument) is not None]
        if name == "embedding":
            self._numbers[node] = self._table(node)
        elif name in self._operators:
            self._numbers[node] = self._layer(node, self._operators[name])
        elif not inputs:
            self._looked_at(node, name)
            return
        elif name in BATCH_NORMS:
            numbers = self._norm(node)
            self._numbers[node] = numbers if name == "batch_norm" else [numbers, None, None]
        elif name == "getitem":
            values = self._numbers[inputs[0]]
            self._numbers[node] = values[place_of(node)] if isinstance(values, (list, tuple)) else None
        elif name in ELEMENTWISE or (name == "prelu" and one_slope(node)):
            self._numbers[node] = self._elementwise(node)
        elif name in LAYOUT and not is_cast(node):
            self._numbers[node] = self._moved(node)
        elif name == "pad":
            self._numbers[node] = self._padded(node)
        elif name in SPATIAL:
            axes = 3 if name.partition("_with")[0].endswith("3d") else 1 if name.endswith("1d") else 2
            numbers = self._without(inputs[0], range(-axes, 0), name)
            self._numbers[node] = [numbers, None] if "_with_indices" in name else numbers
        elif name in REDUCTIONS:
            self._numbers[node] = self._reduced(node, inputs[0], name)
        elif name in SOFTMAX:
            self._numbers[node] = self._mixing(inputs[0], [argument_of(node, "dim")], name)
        elif name in ("layer_norm", "rms_norm"):
            self._numbers[node] = self._mixing(inputs[0], range(-len(argument_of(node, "normalized_shape")), 0), name)
        elif name == "group_norm":
            self._numbers[node] = self._group_norm(node)
        elif name == "scaled_dot_product_attention":
            self._numbers[node] = self._attention(node)
        else:
            for argument in inputs:
                self._freeze_all(argument, f"{name} is no operator that channels are followed through")

    def _looked_at(self, node: Node, name: str) -> None:
        """An operator that reads parameters alone: its result depends on which channels these have."""
        if name == "getitem" or name in CONSTANT:
            return
        self._values |= {self._names[argument] for argument in node.all_input_nodes if argument in self._names}

    def finish(self) -> None:
        """Freeze the channels of tensors whose values are read by an operator other than their layer or norm."""
        for name in sorted(self._values):
            path, reason = self._layers.get(name), f"the values of {name} are read elsewhere"
            for table in (self.flow.made, self.flow.read):
                self.flow.freeze(table.get(path or ""), reason)
            for numbers in self.flow.carried.get(name, {}).values():
                self.flow.freeze(numbers, reason)

    def _freeze_all(self, node: Node, reason: str) -> None:
        numbers = self._numbers.get(node)
        for part in numbers if isinstance(numbers, (list, tuple)) else [numbers]:
            self.flow.freeze(part, reason)

    def _layer(self, node: Node, operator: Operator) -> Tensor | None:
        """A layer of a known kind: reads channels and makes new ones."""
        data, weight = node.args[operator.data], node.args[operator.weight]
        bias = node.args[operator.bias] if len(node.args) > operator.bias else None
        axis = operator.axis
        numbers = self._numbers.get(data) if isinstance(data, Node) else None
        full = self._names.get(weight, "") if isinstance(weight, Node) else ""
        shape = shape_of(node)
        groups = int(number_of(argument_of(node, "groups"))) if operator.grouped else 1
        if groups > 1 and isinstance(weight, Node) and weight in self._names:
            return self._grouped(full, bias, numbers, groups, shape)
        path = self._layers.get(full)
        if path is None:
            why = f"left alone: {self._left[full]}" if full in self._left else "no layer that can be changed"
            self.flow.freeze(numbers, f"{full or operator.name} reads it, which is {why}")
            return None
        if numbers is not None and any(size > 1 for i, size in enumerate(numbers.shape) if i != axis % numbers.ndim):
            self.flow.freeze(numbers, f"{path} reads it along another axis than its own")
            numbers = None
        if numbers is not None:
            if path in self._blind:
                self.flow.freeze(numbers, f"{path} is also called on what is not followed")
            self._note(self.flow.read, path, spread(numbers, axis, shape_of(data)[axis]).flatten())
        else:
            self._blind.add(path)
            self.flow.freeze(self.flow.read.get(path), f"{path} is also called on what is not followed")
        if path not in self.flow.made:
            self.flow.made[path] = self.flow.fresh(shape[axis])
            if isinstance(bias, Node) and bias in self._names:
                self.flow.carried.setdefault(self._names[bias], {})[0] = self.flow.made[path]
        return along(self.flow.made[path], axis, len(shape))

    def _table(self, node: Node) -> Tensor | None:
        """An embedding makes channels of its own; they are removed only together with those of layers."""
        weight: Any = node.args[0]
        if weight not in self._names:
            return None
        name = self._names[weight]
        if name not in self.flow.carried:
            self._carry(name, 1, self.flow.fresh(shape_of(weight)[1]))
            if self._left.get(name) == TIED:
                self.flow.freeze(self.flow.carried[name][1], f"{name} is left alone: {TIED}")
        return along(self.flow.carried[name][1], -1, len(shape_of(node)))

    def _grouped(
        self, weight: str, bias: Any, numbers: Tensor | None, groups: int, shape: Sequence[int]
    ) -> Tensor | None:
        """A depthwise convolution carries its channels; any other grouped one freezes them."""
        if numbers is None:
            return None
        path = weight.rpartition(".")[0]
        if groups != shape[1] or numbers.shape[1] != groups or numbers.numel() != groups:
            self.flow.freeze(numbers, f"{path} is a grouped convolution")
            return None
        own = numbers.flatten()
        self._carry(weight, 0, own)
        if isinstance(bias, Node) and bias in self._names:
            self._carry(self._names[bias], 0, own)
        return numbers

    def _norm(self, node: Node) -> Tensor | None:
        """A batch norm: its tensors go along."""
        data: Any = node.args[0]
        numbers = self._numbers.get(data)
        if not isinstance(numbers, Tensor):
            return None
        if any(size > 1 for axis, size in enumerate(numbers.shape) if axis != 1):
            self.flow.freeze(numbers, "a batch norm reads it along another axis than its own")
            return None
        for argument in node.args[1:5]:
            if isinstance(argument, Node):
                if argument not in self._names:
                    self.flow.freeze(numbers, "a batch norm with computed weights reads it")
                    return None
                self._carry(self._names[argument], 0, numbers.flatten())
        return numbers

    def _group_norm(self, node: Node) -> Tensor | None:
        """A group norm: all channels of a group go together, and its tensors go along."""
        data: Any = node.args[0]
        numbers, count = self._numbers.get(data), int(number_of(argument_of(node, "num_groups")))
        weight = argument_of(node, "weight")
        if not isinstance(numbers, Tensor):
            return None
        if weight not in self._names or any(size > 1 for axis, size in enumerate(numbers.shape) if axis != 1):
            self.flow.freeze(numbers, "a group norm without weights of its own, or along another axis, reads it")
            return None
        own = spread(numbers, 1, shape_of(data)[1]).reshape(count, -1)
        first = own[:, :1].expand(own.shape)
        self.flow.mixed.update(dict.fromkeys(own[:, 0].tolist(), "a group norm mixes all its channels"))
        self.flow.unite(first, own, "a group norm mixes it with channels that must stay")
        for argument in (weight, argument_of(node, "bias")):
            if isinstance(argument, Node):
                self._carry(self._names[argument], 0, own.flatten())
        return numbers

    def _elementwise(self, node: Node) -> Tensor | None:
        """An operator that works element by element: channels that meet go together."""
        rank = len(shape_of(node))
        tracked: Tensor | None = None
        others = []
        cast = operator_of(node) == "type_as"  # of the second operand it is the dtype alone that counts
        for argument in node.all_input_nodes[: 1 if cast else None]:
            numbers = self._numbers.get(argument)
            if isinstance(numbers, Tensor):
                aligned = numbers.reshape(*[1] * (rank - numbers.ndim), *numbers.shape)
                if tracked is not None:
                    self.flow.unite(tracked, aligned, "it meets channels that are not followed")
                    tracked, aligned = broadcast(tracked, aligned)
                    aligned = torch.maximum(tracked, aligned)
                tracked = aligned
            elif is_tensor(argument):
                others.append(argument)
        if tracked is None:
            return None
        tracked = compressed(self.flow.roots(tracked))
        if tracked is None:
            return None
        for argument in others:
            self._meets(argument, tracked)
        return tracked

    def _meets(self, argument: Node, numbers: Tensor) -> None:
        """A tensor without numbers meets channels: a parameter goes along, anything else must not distinguish them."""
        shape = shape_of(argument)
        sizes = numbers.shape[numbers.ndim - len(shape) :]
        varying = [axis for axis, size in enumerate(sizes) if size > 1 and shape[axis] > 1]
        if not varying:
            return
        outer = any(size > 1 for size in numbers.shape[: numbers.ndim - len(shape)])
        offset = numbers.ndim - len(shape)
        others = [axis for axis, size in enumerate(numbers.shape) if size > 1 and axis - offset not in varying]
        if argument not in self._names and others:  # rotary angles differ along a head, and are the same for all heads
            for axis in varying:
                first = numbers.narrow(axis + offset, 0, 1).expand(numbers.shape)
                self.flow.unite(first, numbers, "it meets channels that are not followed")
            return
        if argument not in self._names or len(varying) > 1 or outer or sum(size > 1 for size in numbers.shape) > 1:
            self.flow.freeze(numbers, "it meets a tensor that is no parameter of one axis")
            return
        self._carry(self._names[argument], varying[0], numbers.flatten())

    def _attention(self, node: Node) -> Tensor | None:
        """Attention: a head's queries, keys and values go together; where heads share keys, all of those heads do."""
        operands: list[Any] = list(node.args[:3])
        read = [self._numbers.get(each) for each in operands]
        mask = argument_of(node, "attn_mask")
        by_mask = isinstance(mask, Node) and len(shape_of(mask)) == 4 and shape_of(mask)[1] > 1
        masked = self._numbers.get(mask) if isinstance(mask, Node) else None
        ready = isinstance(masked, Tensor) and masked.ndim == 4 and masked.numel() == masked.shape[1]
        sources = flat_sources(mask, -3) if by_mask and not ready else []
        own_mask = sources is None
        followed = [each for each in read if isinstance(each, Tensor)]
        by_head = all(each.ndim == 4 and each.shape[0] == each.shape[2] == 1 for each in followed)
        if len(followed) < 3 or not by_head or own_mask:
            why = (
                "attention reads it with a mask of its own for each head" if own_mask else "attention reads part of it"
            )
            for each in followed:
                self.flow.freeze(each, why)
            return None
        shapes = [shape_of(each) for each in operands]
        queries, keys, values = (
            each.expand(1, shape[1], 1, shape[3])[0, :, 0] for each, shape in zip(followed, shapes, strict=True)
        )
        times = len(queries) // len(values)
        first = values[:, :1]
        for each, heads in ((values, first), (keys, first), (queries, first.repeat_interleave(times, 0))):
            self.flow.unite(heads.expand(each.shape), each, "attention reads part of it")
        if by_mask and isinstance(masked, Tensor) and ready:
            self.flow.unite(first[:, 0].repeat_interleave(times), masked.flatten(), "attention reads part of it")
        for source in sources or ():  # made for so many heads: all that read it keep equally many, the same ones
            made = self._flat.setdefault(source, self.flow.fresh(len(queries)))
            self.flow.unite(first[:, 0].repeat_interleave(times), made, "attention reads part of it")
        _, _, asked, width = shapes[0]
        self.flow.attended.append((first[:, 0].repeat_interleave(times), asked * shapes[1][2] * (width + shapes[2][3])))
        return compressed(values.repeat_interleave(times, 0)[None, :, None])

    def _moved(self, node: Node) -> Any:
        """An operator that only moves elements, run on the numbers."""

        def value(argument: Node) -> Any:
            if not is_tensor(argument):
                return number_of(argument)
            numbers, shape = self._numbers.get(argument), shape_of(argument)
            if not isinstance(numbers, Tensor):
                return torch.full((1,) * len(shape), STAYS).expand(shape)
            return numbers.expand(shape)

        args: Any = torch.fx.node.map_arg(node.args, value)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, value)
        target: Any = node.target
        if operator_of(node) in ("view", "_unsafe_view"):
            target = torch.ops.aten.reshape.default
        try:
            result = target(*args, **kwargs)
        except Exception as cause:  # noqa: BLE001 - an overload that numbers cannot take
            for argument in node.all_input_nodes:
                self._freeze_all(argument, f"{operator_of(node)} of channels is not followed ({type(cause).__name__})")
            return None
        if isinstance(result, (list, tuple)):
            return [compressed(part) for part in result]
        return compressed(result)

    def _padded(self, node: Node) -> Tensor | None:
        """Padding of other axes than the channels' changes nothing; padded channels are no layer's."""
        data: Any = node.args[0]
        numbers, amounts = self._numbers[data], [int(number_of(size)) for size in node.args[1]]  # type: ignore[union-attr]
        axes = {-1 - i // 2 for i, size in enumerate(amounts) if size}
        if all(numbers.shape[axis] == 1 for axis in axes):
            return numbers if isinstance(numbers, Tensor) else None
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        if mode != "constant":
            self.flow.freeze(numbers, f"padding of channels by {mode}")
            return None
        return compressed(torch.nn.functional.pad(numbers.expand(shape_of(data)), amounts, value=STAYS))

    def _without(self, argument: Node, axes: Iterable[int], name: str) -> Tensor | None:
        """An operator that mixes values along some axes only: channels along these are frozen, others pass."""
        numbers = self._numbers[argument]
        if any(numbers.shape[axis] > 1 for axis in axes):
            self.flow.freeze(numbers, f"{name} mixes channels")
            return None
        return numbers if isinstance(numbers, Tensor) else None

    def _mixing(self, argument: Node, axes: Iterable[int], name: str) -> Tensor:
        """An operator whose result depends on all channels along some axes, and on no others: these go together."""
        numbers: Tensor = self._numbers[argument]
        for axis in axes:
            first = numbers.narrow(axis, 0, 1)
            if numbers.shape[axis] > 1:
                self.flow.mixed.update(dict.fromkeys(first.flatten().tolist(), f"{name} mixes all its channels"))
                self.flow.unite(first, numbers, f"{name} mixes it with channels that must stay")
            numbers = first
        return numbers

    def _reduced(self, node: Node, argument: Node, name: str) -> Tensor | None:
        """A sum or mean over axes."""
        numbers: Tensor = self._numbers[argument]
        dim = argument_of(node, "dim")
        axes = list(range(numbers.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        numbers = self._mixing(argument, axes, name)
        if argument_of(node, "keepdim"):
            return numbers
        kept = [size for axis, size in enumerate(numbers.shape) if axis not in {a % numbers.ndim for a in axes}]
        return numbers.reshape(kept)

    def _note(self, table: dict[str, Tensor], path: str, numbers: Tensor) -> None:
        """Note the channels that a layer reads or makes; at a second call those of both calls go together."""
        if path in table:
            self.flow.unite(table[path], numbers, f"{path} is also called on what is not followed")
        else:
            table[path] = numbers

    def _carry(self, name: str, axis: int, numbers: Tensor) -> None:
        """Note a tensor that goes along with channels."""
        own = self.flow.carried.setdefault(name, {})
        if axis in own:
            self.flow.unite(own[axis], numbers, f"{name} is also used where channels are not followed")
        else:
            own[axis] = numbers

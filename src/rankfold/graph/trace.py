"""One functional graph of the model's forward, through `torch.export`."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree

from rankfold.data.batches import Batch, batch_size, cloned, split_batch, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import is_out_of_memory

TRACED = 2  # number of samples that a model is traced on
ROOM = 2**28  # largest number of bytes of a value of the samples that run at once


@dataclass(frozen=True, eq=False)
class Graph:
    """The traced forward, or the reason why there is none.

    Attributes:
        program: The functional program with dotted parameter names, or None.
        reason: Reason why the model cannot be exported; None where it can.
        static_batch: The batch size the program is bound to, or None where it takes any batch size.
    """

    program: ExportedProgram | None
    reason: str | None = None
    static_batch: int | None = None

    @property
    def any_batch(self) -> bool:
        """Whether there is a program, and it takes any batch size."""
        return self.program is not None and self.static_batch is None

    @functools.cached_property
    def largest(self) -> int:
        """Bytes of a sample's largest value, from the shapes of the trace; 0 without a program of free batch size."""
        nodes = self.program.graph.nodes if self.program is not None and self.any_batch else ()
        return max((_bytes_a_sample(node) for node in nodes if node.op == "call_function"), default=0)

    def at_once(self, most: int, room: int = ROOM) -> int:
        """Number of samples that run at once, so that no value of them takes more than `room` bytes.

        Args:
            most: Largest number of samples.
            room: Largest number of bytes; a single sample may take more.
        """
        return max(1, min(most, room // self.largest)) if self.largest else most


def _bytes_a_sample(node: torch.fx.Node) -> int:
    """Bytes of a node's tensor for each sample; 0 where it does not grow with the batch."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not any(isinstance(size, torch.SymInt) for size in value.shape):
        return 0
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
    if None in sizes:  # as many as the data has, such as what `nonzero` gives
        return 0
    return prod(sizes) * value.element_size() // TRACED


def trace(model: nn.Module, example: Batch) -> Graph:
    """Export the forward in eval mode, with the batch axis free where the model allows it.

    The program is functional: no operator writes into a value that is still needed. A program that is not (of a model
    with `ReLU(inplace=True)`) is made so by `run_decompositions({})`, which traces a second time and takes longer than
    the export. The model is left as it was, its training modes too.

    Args:
        model: The model.
        example: One batch; two samples of it are used.

    Returns:
        The graph; where the export fails, one without a program and with the reason.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout is not torch.strided:  # the exporter aborts the whole process on some of them
            return Graph(None, reason=f"torch.export was not tried: {name} is of layout {tensor.layout}")
    device = device_of(model)
    pair = to_device(take(example, torch.arange(TRACED) % batch_size(example)), device)
    batch = pair if _runs(model, pair) else to_device(example, device)  # some models fix their batch size
    reason = ""
    for free in (True, False) if batch is pair else (False,):
        args, kwargs = split_batch(cloned(batch))  # the exporter marks its inputs
        shapes: Any = (tuple(_free_batch(args)) if args else _free_batch(kwargs)) if free else None
        try:
            with evaluating(model), _attributes_kept(model), _tensor_outputs(model), _quiet():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
                if not _is_functional(program):
                    program = program.run_decompositions({})
            if drawn := _random(program):
                return Graph(None, reason=f"the forward draws random numbers in eval mode ({drawn})")
            return Graph(program, static_batch=None if free else batch_size(batch))
        except Exception as cause:  # whatever the exporter raises, hooks still work
            if is_out_of_memory(cause):
                raise
            lines = str(cause).strip().splitlines()
            reason = f"torch.export failed ({': '.join([type(cause).__name__, *lines[:1]])[:300]})"
    return Graph(None, reason=reason)


def _is_functional(program: ExportedProgram) -> bool:
    """Whether no operator of the program writes into anything."""
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    return kinds <= {OutputKind.USER_OUTPUT} and all(_only_reads(node) for node in program.graph.nodes)


def _only_reads(node: torch.fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", None) in ("_operator", "math")  # arithmetic on sizes, getitem
    if node.target is torch.ops.aten.batch_norm.default:
        return not node.args[5]  # in training mode it writes its running moments, which its schema does not declare
    return not node.target._schema.is_mutable


def _random(program: ExportedProgram) -> str | None:
    """An operator of the program whose value is drawn anew each time; None where there is none."""
    return next((str(node.target) for node in program.graph.nodes if _draws(node)), None)


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operator draws; dropout and attention do so only where they drop something."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    switches = {"dropout_p": 0.0, "train": True, "training": True}
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in switches:
            given = (
                node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            )
            return bool(switches[argument.name] if given is None else given)
    return True


def _runs(model: nn.Module, batch: Batch) -> bool:
    """Whether the model runs on a batch."""
    try:
        with evaluating(model):
            run(model, batch)
    except Exception as cause:  # whatever the model's own code raises
        if is_out_of_memory(cause):
            raise
        return False
    return True


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards tensors that modules hold as plain attributes, such as a computed weight, are those of before.

    A hook that sets one while the model is traced leaves the tracer's own there, which has no data (torch 2.9).
    """
    held = [
        (module, {name: value for name, value in vars(module).items() if isinstance(value, Tensor)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, tensors in held:
            vars(module).update(tensors)


@contextmanager
def _tensor_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns only what the exporter can follow: caches and other objects in its output become None.

    The forward is replaced on the instance meanwhile, so parameters keep their names.
    """
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def followed(*args: Any, **kwargs: Any) -> Any:
        output = followed_output(forward(*args, **kwargs))
        if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(output)):
            raise TypeError("the output holds no tensor that torch.export can follow")
        return output

    vars(model)["forward"] = followed
    try:
        yield
    finally:
        if own:
            vars(model)["forward"] = forward
        else:
            del vars(model)["forward"]


def followed_output(output: Any) -> Any:
    """The output with unknown objects opened where they are mappings or dataclasses, and None in their place otherwise.

    Types that torch's pytrees know (tuples, dicts, the output classes of transformers) are kept.
    """

    def leaf(value: Any) -> Any:
        if value is None or isinstance(value, (Tensor, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        if isinstance(value, Mapping):
            return {name: followed_output(entry) for name, entry in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: followed_output(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return None

    return _pytree.tree_map(leaf, output)


def _free_batch(values: tuple[Any, ...] | dict[str, Any]) -> Any:
    """Dynamic-shape spec that frees the first axis of every tensor of the batch's size."""

    def free(value: Any) -> Any:
        per_sample = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2
        return {0: Dim.DYNAMIC} if per_sample else None

    if isinstance(values, dict):
        return {name: free(value) for name, value in values.items()}
    return [free(value) for value in values]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and graphs of failed attempts off the terminal while it tries."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

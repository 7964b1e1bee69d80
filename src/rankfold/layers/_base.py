"""Kinds of layers: the interface of their adapters, and the registry by type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from rankfold.factors import Factors
from rankfold.layers.geometry import Geometry

A = TypeVar("A", bound="type[Adapter]")
# Names in messages of the methods that adapters rely on.
CODE = {"forward": "forward", "_conv_forward": "convolution", "_output_padding": "output padding"}


@dataclass(frozen=True)
class Operator:
    """An operator that stands for a layer kind in an exported graph.

    Attributes:
        name: Name of the operator, without namespace and overload.
        data: Place of the input among its arguments.
        weight: Place of the weight.
        bias: Place of the bias.
        axis: Axis of the channels of input and output, from the front or the end.
        grouped: True if it has an argument `groups`.
    """

    name: str
    data: int = 0
    weight: int = 1
    bias: int = 2
    axis: int = -1
    grouped: bool = False


class Adapter(ABC):
    """One layer kind: its canonical weight, geometry and input positions. It does not depend on methods.

    Stateless: every method takes the layer. A subclass in a file of its own, registered by `adapts`, is all that a new
    kind needs.
    """

    kind: ClassVar[str]
    weight_axes: ClassVar[tuple[int, int]] = (0, 1)
    """Axes of the stored weight that are output and input channels, of a layer without groups."""
    operators: ClassVar[tuple[Operator, ...]] = ()
    """Operators by which its layers stand in exported graphs, where no other kind names them already."""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods of the layer that must be those of the registered type: a subclass that has others computes otherwise."""

    @abstractmethod
    def geometry(self, layer: nn.Module) -> Geometry:
        """The layer's geometry."""

    @abstractmethod
    def canonical(self, layer: nn.Module) -> Tensor:
        """The weight as groups × out × in × kernel…, a view where possible."""

    def read(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """The values that the canonical weight is multiplied with, in the layout of the layer's input.

        They are the input itself, but for a layer that looks something up.
        """
        return inputs

    def rewrite(self, layer: nn.Module, groups: Tensor) -> None:
        """Give a layer another canonical weight, in place.

        Args:
            layer: The layer.
            groups: Canonical weight of every group, in any dtype; elements in the order of `canonical`.
        """
        own = self.canonical(layer)
        own.copy_(groups.reshape(own.shape))

    def stored(self, layer: nn.Module, groups: Sequence[Factors]) -> Sequence[Factors]:
        """Factors of the canonical weight as factors of what the layer stores, which are the same but for tables."""
        return groups

    @abstractmethod
    def sample_size(self, layer: nn.Module, inputs: Tensor) -> tuple[tuple[int, ...], int]:
        """Spatial size of an input and how many times the layer is applied in it (positions of a linear layer)."""

    @abstractmethod
    def patches(self, layer: nn.Module, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """The patches of the input that the canonical weight is multiplied with.

        Args:
            layer: The layer.
            inputs: Input of the layer.
            positions: Indices into the flattened positions of one sample (spatial) to keep, or None for all.

        Returns:
            Shape (groups, samples·positions, in·k…).
        """

    @abstractmethod
    def outputs(self, layer: nn.Module, outputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """Outputs in the order of `patches`, shape (groups, samples·positions, out)."""

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias, shape (out,), or None."""
        bias = layer.bias
        return bias if isinstance(bias, Tensor) else None

    @abstractmethod
    def resize(self, layer: nn.Module) -> None:
        """Make the attributes that name sizes agree with tensors that were cut."""


_ADAPTERS: dict[str, Adapter] = {}  # adapters by the full name of the layer's type


def adapts(*kinds: type[nn.Module] | str) -> Callable[[A], A]:
    """Register a class of adapters for types of layers.

    Args:
        kinds: The types, or their full names where importing them would load another library.
    """

    def register(adapter: A) -> A:
        for kind in kinds:
            _ADAPTERS[kind if isinstance(kind, str) else _full_name(kind)] = adapter()
        return adapter

    return register


def adapter_for(layer: nn.Module) -> Adapter | None:
    """The adapter of a layer; None for a kind that has none, or a subclass that computes something else."""
    return None if why_no_adapter(layer) is not None else _found(type(layer))[1]


def why_no_adapter(layer: nn.Module) -> str | None:
    """Reason why a layer that holds a weight cannot be compressed; None where an adapter supports it."""
    kind = type(layer)
    base, adapter = _found(kind)
    if base is None or adapter is None:
        return f"no adapter for layers of kind {kind.__name__}"
    for name in adapter.methods:
        if getattr(kind, name, None) is not getattr(base, name, None):
            prefix = "nn." if base.__module__.startswith("torch.nn.") else ""
            return f"{kind.__name__} overrides the {CODE.get(name, name)} of {prefix}{base.__name__}"
    return None


def layer_operators() -> dict[str, Operator]:
    """The operators of all kinds by name."""
    return {each.name: each for adapter in _ADAPTERS.values() for each in adapter.operators}


def _found(kind: type) -> tuple[type | None, Adapter | None]:
    """The registered type that a layer's type derives from, itself included, and its adapter."""
    base = next((each for each in kind.__mro__ if _full_name(each) in _ADAPTERS), None)
    return base, None if base is None else _ADAPTERS[_full_name(base)]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

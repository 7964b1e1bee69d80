"""Tables that are also the weight of an output layer: one table, looked up at one end and multiplied with at the other.

The table stays one: an embedding `y = L T[t]` and a head `z = T (R h) + b` share `T` (V × r), and have a map of their
own each, `L` (d × r) and `R` (r × d).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.layers._base import adapter_for
from rankfold.layers._embedding import EmbeddingAdapter
from rankfold.layers._linear import LinearAdapter
from rankfold.layers.geometry import Geometry, tensor
from rankfold.layers.pivoted import PivotedLayer
from rankfold.layers.shells import build_shell


def heads_of(model: nn.Module) -> dict[str, str]:
    """Path of the head by the path of the table, for every table that is tied to one.

    A pair is an embedding and a linear layer that hold the very same parameter as their weights, and nobody else does.
    A view of the memory, a transposed weight and a third owner make no pair.

    Args:
        model: The model.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter):
                owners.setdefault(id(parameter), []).append((path, module, name))
    found = {}
    for own in owners.values():
        if len(own) != 2 or any(name != "weight" for *_, name in own):
            continue
        kinds = {type(adapter_for(module)): path for path, module, _ in own}
        if set(kinds) == {EmbeddingAdapter, LinearAdapter}:
            found[kinds[EmbeddingAdapter]] = kinds[LinearAdapter]
    return found


def head_geometry(head: nn.Module) -> Geometry:
    """The geometry of a linear layer whose weight is another layer's table: it has no weights of its own."""
    outputs, inputs = tensor(head, "weight").shape
    return Geometry(inputs, outputs, bias=isinstance(head.bias, Tensor), tied=True)


def table_of(shell: nn.Module) -> nn.Parameter:
    """The table, V × r, that the shell of an embedding looks up."""
    core = shell.core if isinstance(shell, PivotedLayer) else next(shell.children())
    table = core.weight
    if not isinstance(core, nn.Embedding) or not isinstance(table, nn.Parameter):
        raise TypeError(f"{type(shell).__name__} is no shell of a table")
    return table


def build_head(head: nn.Module, shell: nn.Module) -> nn.Sequential:
    """The replacement of a head whose table was replaced: an empty map to r numbers, and the table of the shell.

    Args:
        head: The head.
        shell: Shell of the table.

    Returns:
        Two linear layers, the second of which holds the very parameter of the shell, and the head's bias.
    """
    table = table_of(shell)
    built = build_shell(head_geometry(head), "matrix", table.shape[1], device=table.device, dtype=table.dtype)
    last = list(built.children())[-1]
    last.register_parameter("weight", table)
    if isinstance(head.bias, Tensor):
        tensor(last, "bias").data.copy_(head.bias.detach())
    if not isinstance(built, nn.Sequential):
        raise TypeError("a head is a sequence")
    return built

"""Stands in the place of modules that go with a branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from rankfold.layers.stands import Stand
from rankfold.layers.swapping import swap


def below(path: str, owners: Iterable[str]) -> bool:
    """Whether a path is one of some others, or below one of them."""
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def install_stands_(model: nn.Module, stands: Mapping[str, Stand]) -> nn.Module:
    """Put stands in the place of modules, under every name that these have.

    Args:
        model: Model, changed in place. None of its modules below a stand is left in it.
        stands: Stands by path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    return swap(model, {id(modules[path]): stand.build(modules[path], model) for path, stand in stands.items()})

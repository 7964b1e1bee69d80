"""The layers of a model that are to be replaced for training, and the model itself or a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rankfold.errors import OptionError, SiteError, near_matches
from rankfold.factors import Factors
from rankfold.install.swap import train_as_
from rankfold.layers import Adapter, Geometry, adapter_for, build_shell, fill_shell
from rankfold.sites.copies import copied
from rankfold.sites.finding import check_selection
from rankfold.sites.models import check_module
from rankfold.sites.refusals import address, why_unfit
from rankfold.training.forms import Ordered, Overparameterized

# Modules whose own code reads the weights of layers in them, and those whose layers are factors already.
WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, Overparameterized, Ordered)


def target_of(model: nn.Module, optimizer: Optimizer | None, inplace: bool) -> nn.Module:
    """The model that is changed: the one given, or a copy.

    Raises:
        OptionError: An optimizer is given for a copy.
    """
    model = check_module(model)
    if optimizer is not None and not inplace:
        raise OptionError(
            "optimizer",
            law="a model that is changed in place",
            got="a copy, which it knows nothing of",
            cure="pass inplace=True",
        )
    return model if inplace else copied(model)


def _left_alone(model: nn.Module) -> dict[str, str]:
    """Reason why a layer cannot be replaced, by path, of those that have one: as in `find_sites`, without a forward."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not is_lazy(parameter):
                owners.setdefault(address(parameter), set()).add(id(module))
    reasons: dict[str, str] = {}
    whole = {
        path: kind.__name__ for path, module in model.named_modules() for kind in WHOLE if isinstance(module, kind)
    }
    for path, layer in model.named_modules():
        if adapter_for(layer) is None:
            continue
        above = next((other for other in whole if other == "" or path.startswith(f"{other}.")), None)
        if above is not None:
            reasons[path] = f"read elsewhere: the code of its {whole[above]} reads its weight, or it is one already"
        elif (why := why_unfit(layer)) is not None:
            reasons[path] = why
        elif any(len(owners[address(parameter)]) > 1 for parameter in layer.parameters(recurse=False)):
            reasons[path] = "tied: its weight is also another layer's"
    return reasons


def selected(
    paths: Collection[str],
    *,
    only: Sequence[str] | None,
    exclude: Sequence[str],
    place: str,
    left: Mapping[str, str] | None = None,
) -> list[str]:
    """The paths that match `only` and not `exclude`, in their order.

    Args:
        paths: Paths to choose among.
        only: Paths or patterns (`*`, `?`); None is all.
        exclude: Paths or patterns.
        place: Who asks, for messages.
        left: Reason why a layer is not among the paths, by its own.

    Raises:
        SiteError: A pattern matches none of the paths; near ones, or the reason, are named.
    """
    for pattern in [*(only or ()), *exclude]:
        if not any(fnmatchcase(path, pattern) for path in paths):
            why = next((why for path, why in (left or {}).items() if fnmatchcase(path, pattern)), None)
            raise SiteError(
                f"{place} {pattern!r}",
                law="a selection names layers of the model that the call is about",
                got="no match" if why is None else f"a layer that is left alone ({why})",
                cure=near_matches(pattern, list(paths)),
            )
    chosen = [path for path in paths if only is None or any(fnmatchcase(path, pattern) for pattern in only)]
    return [path for path in chosen if not any(fnmatchcase(path, pattern) for pattern in exclude)]


def factored_layers(layer: nn.Module, adapter: Adapter, groups: Sequence[Factors]) -> list[nn.Module]:
    """Layers that multiply out to one, trained as it is; the bias of the last is the layer's own parameter.

    Args:
        layer: The layer.
        adapter: Its adapter.
        groups: Factors of each group.
    """
    weight = adapter.canonical(layer)
    form, ranks = groups[0].form, groups[0].ranks
    shell = build_shell(adapter.geometry(layer), form, ranks, device=weight.device, dtype=weight.dtype)
    fill_shell(shell, groups, adapter.bias(layer))
    train_as_(shell, layer)
    parts = list(shell.train(layer.training).children())
    if isinstance(layer.bias, nn.Parameter):
        parts[-1].bias = layer.bias
    return parts


def chosen_layers(
    model: nn.Module,
    fits: Callable[[Geometry], bool],
    *,
    only: Sequence[str] | None,
    exclude: Sequence[str],
    place: str,
) -> dict[str, tuple[nn.Module, Adapter]]:
    """Layer and adapter by path of what can be replaced and was selected; a layer with several names has one.

    Args:
        model: The model.
        fits: Whether a layer can be replaced.
        only: Paths or patterns (`*`, `?`) of the layers; None is all.
        exclude: Paths or patterns of layers to leave alone.
        place: Name of the function, for messages.

    Raises:
        OptionError: A selection is no list of strings.
        SiteError: A pattern matches no layer, or no layer is left.
    """
    check_selection(only, exclude)
    found: dict[str, tuple[nn.Module, Adapter]] = {}
    left = _left_alone(model)
    for path, layer in model.named_modules():
        adapter = adapter_for(layer)
        if adapter is not None and path not in left and fits(adapter.geometry(layer)):
            found[path] = layer, adapter
    paths = selected(found, only=only, exclude=exclude, place=place, left=left)
    chosen = {path: found[path] for path in paths}
    if not chosen:
        raise SiteError(place, law="a layer is left that can be replaced", got="none", cure="select more layers")
    return chosen

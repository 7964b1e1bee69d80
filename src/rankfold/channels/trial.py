"""Whether units of channel groups can go: a narrowed copy must run, and compute what is left of the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.channels.groups import ChannelGroup
from rankfold.channels.heads import EMBEDDINGS, HEADS, with_attributes
from rankfold.channels.narrowing import attributes_of, cuts_of, narrow_
from rankfold.comparison.misfit import misfit
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run
from rankfold.errors import is_out_of_memory
from rankfold.layers import adapter_for
from rankfold.sites.copies import copied, in_single

FEW = 4  # samples in all trials but the first, where the model takes a batch of any size


def removable(
    model: nn.Module, groups: Sequence[ChannelGroup], example: Batch, *, any_batch: bool
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups whose units can go, with the attributes of modules that then change, and why others cannot.

    Without a fold, a network without some channels must give the very outputs of the original in which nobody reads
    them. A forward that names its own width, counts its heads or looks at the values of a weight that was cut does not.

    A model in half precision is tried in single, where it runs in that: half hides a fault behind its rounding.

    Args:
        model: The original model.
        groups: Candidate groups.
        example: One batch.
        any_batch: True if the model takes a batch of any size.

    Returns:
        The groups, and by name the reason for each other one.
    """
    if not groups:
        return [], {}
    model, example = in_single(model, to_device(example, device_of(model)))
    groups = [with_attributes(model, group, HEADS) for group in groups]
    if why_not(model, groups, example, any_batch=any_batch) is None:
        return list(groups), {}
    found, skips = [], {}
    for group in groups:
        why = None
        for names in (HEADS, (*HEADS, *EMBEDDINGS), ()):
            changed = with_attributes(model, group, names)
            reason = why_not(model, [changed], example, any_batch=any_batch)
            if reason is None:
                found.append(changed)
                break
            why = why or reason
        else:
            skips[group.name] = f"frozen: the model fails without some of them ({why})"
    if found and why_not(model, found, example, any_batch=any_batch) is not None:  # each alone, but not all
        together: list[ChannelGroup] = []
        for group in found:
            why = why_not(model, [*together, group], example, any_batch=any_batch)
            if why is None:
                together.append(group)
            else:
                skips[group.name] = f"frozen: the model fails without some of them and of others ({why})"
        found = together
    return found, skips


def why_not(model: nn.Module, groups: Sequence[ChannelGroup], example: Batch, *, any_batch: bool = True) -> str | None:
    """Fault of a model that lost some units of some groups; None where it is right.

    Args:
        model: The original model.
        groups: The groups that lose units: the first one, every other one, all but the first.
        example: One batch, where the model is.
        any_batch: True if the model takes a batch of any size.
    """
    batch = example  # the whole batch at first: some layers are reached by that alone
    before: list[Tensor] | None = None
    for masks in _trials(groups):
        try:
            narrow = narrow_(copied(model), cuts_of(model, groups, masks), attributes_of(groups, masks))
            got, expected = (_outputs(each, batch) for each in (narrow, _unread(model, groups, masks)))
            before = _outputs(model, batch) if before is None else before
        except Exception as cause:  # whatever the model's own code raises
            if is_out_of_memory(cause):
                raise
            return f"{type(cause).__name__}: {cause}".splitlines()[0][:120]
        if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
            return "its outputs have other shapes"
        if not all(misfit(*each).worst <= 1 for each in zip(got, expected, before, strict=True)):
            return "it computes something else"
        if any_batch and batch_size(batch) > FEW:
            batch, before = take(batch, torch.arange(FEW)), None
    return None


def _trials(groups: Sequence[ChannelGroup]) -> Iterator[dict[str, Tensor]]:
    """Masks of what stays: all but the first unit, every other one, the first alone."""
    units = {group.name: torch.arange(group.units) for group in groups}
    yield {name: own != 0 for name, own in units.items()}
    yield {name: own % 2 == 0 for name, own in units.items()}
    yield {name: own == 0 for name, own in units.items()}


def _unread(model: nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which the layers that read channels have zeros for those that are gone."""
    result = copied(model)
    modules = dict(result.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for group in groups:
            for path, units in group.read.items():
                adapter = adapter_for(modules[path])
                if adapter is None:
                    raise TypeError(f"{path} has no adapter")
                own = torch.tensor(units)
                gone = torch.nonzero((own >= 0) & ~masks[group.name][own.clamp_min(0)]).flatten()
                weight = modules[path].get_parameter("weight")
                weight.index_fill_(adapter.weight_axes[1], gone.to(weight.device), 0)
    return result


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    with evaluating(model):
        leaves = _pytree.tree_leaves(run(model, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

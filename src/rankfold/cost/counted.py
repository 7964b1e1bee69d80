"""Cost by counting on the live module; tests demand that it equals the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rankfold.cost.operators import FORMULAS, missed
from rankfold.cost.resources import RESOURCES, Cost, Holding
from rankfold.data.batches import Batch, batch_size, take, to_device
from rankfold.data.running import device_of, evaluating, run


def count_params(model: nn.Module) -> int:
    """Elements of all parameters; a shared one counts once, a lazy one without a shape not at all."""
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def count_bytes(model: nn.Module) -> int:
    """Bytes of the state dict (parameters and persistent buffers); one tensor under several names counts once."""
    seen: set[tuple[int, int]] = set()
    return sum(_new_bytes(tensor, seen) for tensor in model.state_dict(keep_vars=True).values())


def _new_bytes(tensor: Any, seen: set[tuple[int, int]]) -> int:
    """Bytes of an entry of a state dict that was not seen yet."""
    if not isinstance(tensor, torch.Tensor) or is_lazy(tensor):
        return 0
    plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
    place = ((tensor.data_ptr() if plain else 0) or -id(tensor), tensor.numel())
    if place in seen:
        return 0
    seen.add(place)
    return tensor.numel() * tensor.element_size()


def holdings(model: nn.Module, macs: Mapping[str, int]) -> tuple[Holding, ...]:
    """Cost of what each module has of its own; a shared tensor counts at the module that comes first.

    Args:
        model: The model.
        macs: Multiply-accumulates by path of the module; see `Counted`.
    """
    seen: set[tuple[int, int]] = set()
    counted_already: set[int] = set()
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    found = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if not is_lazy(p) and id(p) not in counted_already]
        counted_already |= {id(p) for p in own}
        kept = [t for name, t in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
        cost = Cost(
            sum(p.numel() for p in own),
            sum(macs.get(name, 0) for name in paths[id(module)]),
            sum(_new_bytes(tensor, seen) for tensor in (*own, *kept)),
        )
        if cost != Cost():
            found.append(Holding(path, type(module).__name__, cost))
    return tuple(found)


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates of one forward.

    Attributes:
        macs: Multiply-accumulates per sample.
        by_module: Part of them that the code of each module itself does, per sample, by its path; "" is the model.
        missed: Operators that multiply matrices, or may, and that nothing counts, each with the path of a module whose
            code calls it.
    """

    macs: int
    by_module: Mapping[str, int]
    missed: tuple[str, ...]


class _Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode below torch's counter, which sees the operators that a forward is taken apart into. It notes which module
    calls each, and whether any formula covers it.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.root, self.counter = type(model).__name__, counter
        self.flops: dict[str, int] = {}
        self.missed: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        path = self._path()
        formula = self.counter.flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops[path] = self.flops.get(path, 0) + int(formula(*args, **(kwargs or {}), out_val=result))
        elif (name := missed(func, self.counter.flop_registry)) is not None:
            self.missed[f"{name} in {path}" if path else name] = None
        return result

    def _path(self) -> str:
        """Path of the module whose code runs: the deepest of those entered. The counter's names begin with a class."""
        paths = (name.partition(".") for name in self.counter.mod_tracker.parents)
        own = [path for root, _, path in paths if root == self.root]
        return max(own, key=lambda path: len(path.split(".")) if path else 0, default="")


def counted(model: nn.Module, example: Batch) -> Counted:
    """Multiply-accumulates per sample: half the FLOPs that torch's own counter sees, with formulas for what it leaves
    out (recurrent layers in one kernel, `nn.Bilinear`, products with a vector; see `cost.operators`).

    Matrix products of attention count too. The model runs once on one sample, or, where it cannot, on the batch. Fused
    kernels (attention, `nn.TransformerEncoderLayer`) that the counter cannot see into are switched off meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    tallies: list[_Tally] = []

    @contextmanager
    def counting() -> Iterator[None]:
        counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
        tallies.append(_Tally(model, counter))
        with tallies[-1], counter:
            yield

    try:
        with sdpa_kernel(SDPBackend.MATH):
            samples = run_one(model, example, watched=counting)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    tally, each = tallies[-1], 2 * samples
    by_module = {path: flops // each for path, flops in tally.flops.items() if flops}
    return Counted(int(tally.counter.get_total_flops()) // each, by_module, tuple(tally.missed))


def count_macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates per sample; see `counted`."""
    return counted(model, example).macs


def run_one(
    model: nn.Module, example: Batch, *, watched: Callable[[], AbstractContextManager[object]] = nullcontext
) -> int:
    """Run the model in eval mode on the first sample of a batch; where it refuses that, on the whole batch.

    Args:
        model: The model.
        example: One batch.
        watched: Function that makes a context for each try, so that a failed try leaves nothing in what is counted.

    Returns:
        Number of samples that were run.
    """
    example = to_device(example, device_of(model))
    try:
        with evaluating(model), watched():
            run(model, take(example, torch.arange(1)))
        return 1
    except Exception:
        if batch_size(example) == 1:
            raise
    with evaluating(model), watched():
        run(model, example)
    return batch_size(example)


LIVE: dict[str, Callable[[nn.Module, Counted], int]] = {
    "params": lambda model, seen: count_params(model),
    "macs": lambda model, seen: seen.macs,
    "bytes": lambda model, seen: count_bytes(model),
}


def count(model: nn.Module, example: Batch) -> Cost:
    """All resources of a live model."""
    return amounts_of(model, counted(model, example))


def amounts_of(model: nn.Module, seen: Counted) -> Cost:
    """All resources of a live model, one forward of which was counted."""
    return Cost(**{name: LIVE[name](model, seen) for name in RESOURCES})

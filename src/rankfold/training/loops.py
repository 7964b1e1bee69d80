"""What the callbacks of training libraries share: penalties and a sampler as one thing with one state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.errors import OptionError, shown
from rankfold.training._base import Regularizer, add, unwrapped
from rankfold.training.ordered import OrderedSampler


@dataclass(frozen=True)
class Parts:
    """Penalties, and the sampler of ordered ranks.

    Attributes:
        penalties: Added before each step of the optimizer.
        sampler: Steps before each batch.

    Raises:
        OptionError: There is neither, or one is no penalty or no sampler.
    """

    penalties: tuple[Regularizer, ...]
    sampler: OrderedSampler | None

    def __post_init__(self) -> None:
        wrong = [each for each in self.penalties if not isinstance(each, Regularizer)]
        if wrong:
            raise _refused("penalties, such as NuclearNorm(share=0.05)", shown(wrong[0]))
        if self.sampler is not None and not isinstance(self.sampler, OrderedSampler):
            raise _refused("an OrderedSampler as sampler", shown(self.sampler))
        if not self.penalties and self.sampler is None:
            raise _refused("a penalty, or a sampler", "neither")

    @property
    def names(self) -> list[str]:
        """A name for each penalty: its class, and a number where there are several."""
        kinds = [type(each).__name__ for each in self.penalties]
        return [kind if kinds.count(kind) == 1 else f"{kind}-{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]

    @property
    def shares(self) -> bool:
        """Whether a penalty is a share of the loss."""
        return any(each.share is not None for each in self.penalties)

    def add_gradients(self, model: nn.Module, loss: Tensor | None, optimizer: Optimizer) -> dict[str, Tensor]:
        """Add the gradients of all penalties that act on a weight which the optimizer steps.

        Returns:
            Each penalty by its name.
        """
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if not any(id(each) in held for each in unwrapped(model).parameters()):
            return {}
        found = {
            name: each.gradients(model, loss, optimizer=optimizer)
            for name, each in zip(self.names, self.penalties, strict=True)
        }
        for _, changes in found.values():  # none is changed before all are there
            add(changes)
        return {name: value for name, (value, _) in found.items()}

    def check(self, model: nn.Module) -> None:
        """Refuse a model on which a penalty says nothing, or which is not the sampler's, before the first step.

        Raises:
            SiteError, OptionError: See `Regularizer.values` and `OrderedSampler.check`.
        """
        for each in self.penalties:
            with torch.no_grad():
                each.values(model)
        if self.sampler is not None:
            self.sampler.check(model)

    @property
    def key(self) -> str:
        """What tells the state of these parts from that of others: penalties and the layers they act on."""
        told = [f"{type(each).__name__} only={each.only} exclude={list(each.exclude)}" for each in self.penalties]
        return "; ".join(told + ["sampler"] * (self.sampler is not None))

    def state_dict(self) -> dict[str, Any]:
        """State of all, of numbers, strings and lists."""
        penalties = {name: each.state_dict() for name, each in zip(self.names, self.penalties, strict=True)}
        return {"penalties": penalties, "sampler": None if self.sampler is None else self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` gave.

        Raises:
            OptionError: It is of other penalties, or of a sampler where there is none.
        """
        known, sampler = state.get("penalties"), state.get("sampler")
        fits = isinstance(known, Mapping) and list(known) == self.names
        if not fits or not isinstance(known, Mapping) or (sampler is None) != (self.sampler is None):
            told = [*known] if isinstance(known, Mapping) else state
            own = self.names + ["a sampler"] * (self.sampler is not None)
            raise OptionError(
                "PenaltyCallback",
                law="a state of the same penalties in the same order, and of a sampler if there is one",
                got=f"one of {shown(told)}{' and a sampler' if sampler is not None else ''} for {own}",
                cure="resume with the callback that the checkpoint was written with",
            )
        if self.sampler is not None and sampler is not None:
            self.sampler.load_state_dict(sampler)  # before the means, since it looks whether the state fits
        for each, own_state in zip(self.penalties, known.values(), strict=True):
            each.load_state_dict(own_state)


def _refused(law: str, got: str) -> OptionError:
    return OptionError("PenaltyCallback", law=law, got=got, cure="try PenaltyCallback(NuclearNorm(share=0.05))")

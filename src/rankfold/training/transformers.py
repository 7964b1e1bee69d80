"""Penalties, and the sampler of ordered ranks, in the training loop of Hugging Face's `Trainer`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankfold.errors import OptionError
from rankfold.training._base import Regularizer, unwrapped
from rankfold.training.loops import Parts
from rankfold.training.ordered import OrderedSampler

STATE = "rankfold"  # how the name of a state in `TrainerState.stateful_callbacks` begins
REFUSED = {"fp16": "bf16=True", "deepspeed": "DistributedDataParallel", "fsdp": "DistributedDataParallel"}


class PenaltyCallback(TrainerCallback):  # type: ignore[misc]
    """Penalties for `transformers.Trainer(…, callbacks=[PenaltyCallback(NuclearNorm(share=0.05))])`.

    Their gradient is added once before each step of the optimizer, after all accumulated batches. `Trainer` clips
    gradients before that, so those of the penalties are not clipped. A share is one of the loss that the model returns
    (`outputs.loss`, or the first of a tuple); where `Trainer` computes it outside the model (`compute_loss_func`, label
    smoothing, a class of your own with another `compute_loss`), give a weight. Paths in `only` and `exclude` are those
    of the model. State is in the checkpoints of `Trainer`, and restored whatever
    `restore_callback_states_from_checkpoint` says, which knows nothing of it.

    Args:
        *penalties: The penalties.
        sampler: Sampler of ordered ranks, which steps before each step and rests after training.

    Raises:
        OptionError: There is neither; on the start of training, weights are sharded, gradients scaled (`fp16`), or the
            sampler is of another model; on a step, the model returned no loss that a share could be one of.
        SiteError: On the start of training: a pattern matches no layer, or a penalty says nothing about any.
    """

    def __init__(self, *penalties: Regularizer, sampler: OrderedSampler | None = None) -> None:
        self._parts = Parts(penalties, sampler)
        self.penalties, self.sampler = penalties, sampler
        self._losses: list[Tensor] = []
        self._sums = False  # whether losses of accumulated batches are parts of a sum, and not of a mean
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any
    ) -> None:
        """Refuse what cannot be done, and go on where a checkpoint stands."""
        by_environment = os.environ.get("ACCELERATE_MIXED_PRECISION")
        for name, cure in REFUSED.items():
            if got := getattr(args, name, None) or by_environment == name:
                raise OptionError(
                    "PenaltyCallback",
                    law="whole weights and gradients that are not scaled in every process",
                    got=f"{name}={got!r}",
                    cure=f"train with {cure}",
                )
        self._rest()  # after a training that was cut off
        model: nn.Module = unwrapped(known["model"])
        self._parts.check(model)
        told = (state.stateful_callbacks or {}).get(self._key)
        if isinstance(told, Mapping):
            self._parts.load_state_dict(told)
        elif state.global_step and (self._parts.shares or self.sampler is not None):
            warnings.warn(f"PenaltyCallback: the checkpoint has no state of {self._parts.key}", stacklevel=2)
        if self._parts.shares:
            self._hook = model.register_forward_hook(self._keep, with_kwargs=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """Keep the loss of a training batch."""
        if model.training and torch.is_grad_enabled():
            first = outputs[0] if isinstance(outputs, tuple) and outputs else None
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else first
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._losses.append(loss.detach().float().mean())
                self._sums = kwargs.get("num_items_in_batch") is not None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any
    ) -> None:
        """Draw the ranks of the step."""
        if self.sampler is not None:
            self.sampler.step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any
    ) -> None:
        """Add the gradients of the penalties."""
        optimizer: Optimizer = known["optimizer"]
        self._parts.add_gradients(known["model"], self._loss(args), optimizer)
        if state.stateful_callbacks is not None:
            state.stateful_callbacks[self._key] = self._parts.state_dict()

    def _loss(self, args: TrainingArguments) -> Tensor | None:
        """The loss of the step, None where no penalty is a share of it."""
        if not self._parts.shares:
            return None
        if not self._losses:
            raise OptionError(
                "PenaltyCallback",
                law="a model that returns its loss, of which the penalty is a share",
                got="none",
                cure="give the penalty a weight in place of a share",
            )
        total = torch.stack(self._losses).sum()
        processes = args.world_size if args.average_tokens_across_devices else 1  # parts of a sum over all of them
        loss = total * processes if self._sums else total / len(self._losses)
        self._losses.clear()
        return loss

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **known: Any) -> None:
        """All ranks again, and no hook left."""
        self._rest()

    def _rest(self) -> None:
        """As if nothing had begun."""
        self._losses.clear()
        if self.sampler is not None:
            self.sampler.rest()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def _key(self) -> str:
        """Name of the state: several callbacks can stand side by side."""
        return f"{STATE}: {self._parts.key}"

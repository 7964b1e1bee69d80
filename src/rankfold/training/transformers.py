"""Penalties, and the sampler of ordered ranks, in the training loop of Hugging Face's `Trainer`."""

from __future__ import annotations

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

STATE = "rankfold"  # under this name in `TrainerState.stateful_callbacks`


class PenaltyCallback(TrainerCallback):  # type: ignore[misc]
    """Penalties for `transformers.Trainer(…, callbacks=[PenaltyCallback(NuclearNorm(share=0.05))])`.

    Their gradient is added once before each step of the optimizer, after all accumulated batches. `Trainer` clips
    gradients before that, so those of the penalties are not clipped. A share is one of the loss that the model returns
    (`outputs.loss`); where `Trainer` computes it outside the model (`compute_loss_func`, label smoothing), give a
    weight. Paths in `only` and `exclude` are those of the model. State is in the checkpoints of `Trainer`.

    Args:
        *penalties: The penalties.
        sampler: Sampler of ordered ranks, which steps before each step and rests after training.

    Raises:
        OptionError: There is neither; on the start of training, weights are sharded or gradients scaled (`fp16`); on a
            step, the model returned no loss that a share could be one of.
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
        for name, cure in (("fp16", "bf16=True"), ("deepspeed", "DistributedDataParallel"), ("fsdp", "the same")):
            if getattr(args, name, None):
                raise OptionError(
                    "PenaltyCallback",
                    law="whole weights and gradients that are not scaled in every process",
                    got=f"{name}={getattr(args, name)!r}",
                    cure=f"train with {cure}",
                )
        told = (state.stateful_callbacks or {}).get(STATE)
        if isinstance(told, Mapping):
            self._parts.load_state_dict(told)
        self._losses.clear()
        if self._parts.shares:
            model: nn.Module = unwrapped(known["model"])
            self._hook = model.register_forward_hook(self._keep, with_kwargs=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """Keep the loss of a training batch."""
        if model.training and torch.is_grad_enabled():
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            if isinstance(loss, Tensor):
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
            state.stateful_callbacks[STATE] = self._parts.state_dict()

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
        if self.sampler is not None:
            self.sampler.rest()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

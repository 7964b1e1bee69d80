"""Penalties, and the sampler of ordered ranks, in the training loop of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from rankfold.errors import OptionError
from rankfold.training._base import Regularizer
from rankfold.training.loops import Parts
from rankfold.training.ordered import OrderedSampler

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # weights are not whole in a process


class PenaltyCallback(pl.Callback):  # type: ignore[misc]
    """Penalties for `lightning.pytorch.Trainer(callbacks=[PenaltyCallback(NuclearNorm(share=0.05))])`.

    Their gradient is added once before each step of the optimizer, after all accumulated batches and before gradients
    are clipped; a share is one of the loss that goes backward (by `manual_backward`, where optimization is manual).
    Where no loss went backward nothing is added. Values are logged as `penalty/NAME`. Paths in `only` and `exclude` are
    those of the `LightningModule`. State is in Lightning's checkpoints.

    Args:
        *penalties: The penalties.
        sampler: Sampler of ordered ranks, which steps before each batch and rests after training.

    Raises:
        OptionError: There is neither; on the start of training, weights are sharded, gradients stay scaled until the
            optimizer steps (a fused optimizer with "16-mixed"), the optimizer compares losses (LBFGS with a line
            search), or the sampler is of another model.
        SiteError: On the start of training: a pattern matches no layer, or a penalty says nothing about any.
    """

    def __init__(self, *penalties: Regularizer, sampler: OrderedSampler | None = None) -> None:
        self._parts = Parts(penalties, sampler)
        self.penalties, self.sampler = penalties, sampler
        self._loss: Tensor | None = None  # of the batches that went backward since an optimizer stepped
        self._stepped: set[int] = set()  # the optimizers that stepped on it

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint, by the penalties: several callbacks can stand side by side."""
        return str(self._generate_state_key(parts=self._parts.key))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be done before the first step, and begin anew after a training that was cut off."""
        strategy = type(trainer.strategy)
        if any(each.__name__ in SHARDED for each in strategy.__mro__):
            raise OptionError(
                "PenaltyCallback",
                law="a strategy that keeps weights whole in every process",
                got=strategy.__name__,
                cure='train with strategy="ddp" or on one device',
            )
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        fused = [each for each in trainer.optimizers if getattr(each, "_step_supports_amp_scaling", False)]
        if scaled and fused:
            raise OptionError(
                "PenaltyCallback",
                law="gradients that are not scaled when penalties are added",
                got=f"{type(fused[0]).__name__}, fused, with {trainer.precision!r}",
                cure='set fused=False, or precision="bf16-mixed"',
            )

        searching = [each for each in trainer.optimizers if _searches(each)]
        if searching:
            raise OptionError(
                "PenaltyCallback",
                law="an optimizer that does not compare losses, which are without the penalty here",
                got=f"{type(searching[0]).__name__} with a line search",
                cure="set line_search_fn=None, or add the penalty to the loss in training_step",
            )
        self._parts.check(pl_module)
        self._forget()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Draw the ranks of the batch."""
        if self.sampler is not None:
            self.sampler.step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss, which Lightning divided by the number of accumulated batches, and may have scaled."""
        if self._stepped:
            self._forget()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        told = loss.detach() if scaler is None else loss.detach() / scaler.get_scale()
        self._loss = told if self._loss is None else self._loss + told

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradients of the penalties."""
        fresh = self._loss is not None and id(optimizer) not in self._stepped
        if not fresh and pl_module.automatic_optimization:
            return  # training_step gave no loss
        if not fresh and self._parts.shares:
            raise OptionError(
                "PenaltyCallback",
                law="a loss that went backward, of which the penalty is a share",
                got="none since the optimizer stepped",
                cure="call self.manual_backward(loss), or give the penalty a weight",
            )
        for name, value in self._parts.add_gradients(pl_module, self._loss, optimizer).items():
            pl_module.log(f"penalty/{name}", value)
        self._stepped.add(id(optimizer))

    def _forget(self) -> None:
        """Nothing went backward yet."""
        self._loss, self._stepped = None, set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """All ranks again, as at the end."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All ranks again."""
        if self.sampler is not None:
            self.sampler.rest()

    def state_dict(self) -> dict[str, Any]:
        """State of the penalties and of the sampler."""
        return self._parts.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` gave."""
        self._parts.load_state_dict(state_dict)


def _searches(optimizer: Optimizer) -> bool:
    return any(group.get("line_search_fn") is not None for group in optimizer.param_groups)

"""Penalties in Hugging Face's loop are those of a loop of one's own, accumulated and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankfold.errors import OptionError, SiteError
from rankfold.training import HierarchicalLasso, NuclearNorm, OrderedSampler, Regularizer, SecondDerivative, to_ordered

pytestmark = [pytest.mark.usefixtures("mended_torchvision"), pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    """Returns its loss as models of that library do, by name or as the first of a tuple."""

    def __init__(self, mapping: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.mapping = mapping

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor] | tuple[Tensor, ...]:
        logits = self.second(torch.relu(self.first(x)))
        if labels is None:  # Trainer computes the loss
            return {"logits": logits}
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.mapping else (loss, logits)


def data() -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=draws), "labels": torch.randint(4, (), generator=draws)} for _ in range(24)]


def fit(
    folder: Path,
    model: nn.Module,
    callback: Any,
    resume: Path | None = None,
    others: Sequence[Any] = (),
    loss: Any = None,
    **options: Any,
) -> None:
    from transformers import Trainer, TrainingArguments

    arguments: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        **options,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data(),
        callbacks=[callback, *others],
        compute_loss_func=loss,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def own(model: Net, penalty: Regularizer, accumulate: int) -> None:
    """The same by hand: the penalty after the gradients were clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0)
    for _ in range(2):
        losses: list[Tensor] = []
        for index in range(0, 24, 4):
            batch = data()[index : index + 4]
            out = model(torch.stack([each["x"] for each in batch]), torch.stack([each["labels"] for each in batch]))
            loss = out["loss"] / accumulate
            loss.backward()
            losses.append(loss.detach())
            if len(losses) == accumulate:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                penalty.add_gradients(model, torch.stack(losses).sum())
                optimizer.step()
                optimizer.zero_grad()
                losses.clear()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_the_loop_of_ones_own(accumulate: int, tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    ours, theirs = Net(), Net()
    own(ours, NuclearNorm(share=0.5), accumulate)
    callback = PenaltyCallback(NuclearNorm(share=0.5, only=["first", "second"]))
    fit(tmp_path, theirs, callback, gradient_accumulation_steps=accumulate)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not theirs._forward_hooks


def test_stopped_and_resumed_is_not_stopped(tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    def parts(model: nn.Module) -> PenaltyCallback:
        return PenaltyCallback(HierarchicalLasso(share=0.2), sampler=OrderedSampler(model, seed=5))

    whole, rest = (to_ordered(Net()) for _ in range(2))
    fit(tmp_path, whole, parts(whole), save_strategy="epoch")
    half = tmp_path / "checkpoint-6"
    for restore in (False, True):
        fit(tmp_path / "again", rest, parts(rest), half, restore_callback_states_from_checkpoint=restore)
        assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_tuple_begins_with_its_loss(tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    named, first = Net(), Net(mapping=False)
    for model in (named, first):
        fit(tmp_path, model, PenaltyCallback(NuclearNorm(share=0.1)))
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in named.state_dict().items())


def test_a_loss_outside_the_model_has_no_share(tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    def loss(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    with pytest.raises(OptionError, match="a model that returns its loss"):
        fit(tmp_path, Net(), PenaltyCallback(NuclearNorm(share=0.1)), loss=loss)
    fit(tmp_path, Net(), PenaltyCallback(NuclearNorm(0.1)), loss=loss)


def test_a_training_that_was_cut_off_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from rankfold.training.transformers import PenaltyCallback

    class Struck(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, *args: Any, **known: Any) -> None:
            raise KeyboardInterrupt

    model, fresh = Net(), Net()
    callback = PenaltyCallback(NuclearNorm(share=0.5))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, model, callback, others=[Struck()], gradient_accumulation_steps=3)
    model.load_state_dict(fresh.state_dict())
    fit(tmp_path, model, callback)
    fit(tmp_path, fresh, PenaltyCallback(NuclearNorm(share=0.5)))
    assert not model._forward_hooks
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_two_callbacks_keep_a_state_each_and_one_without_is_warned_of(tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    def parts() -> list[PenaltyCallback]:
        return [PenaltyCallback(NuclearNorm(share=0.3, only=[path])) for path in ("first", "second")]

    whole, rest = Net(), Net()
    fit(tmp_path, whole, parts()[0], others=parts()[1:], save_strategy="epoch")
    half = tmp_path / "checkpoint-6"
    fit(tmp_path / "again", rest, parts()[0], half, others=parts()[1:])
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.warns(UserWarning, match="the checkpoint has no state of SecondDerivative"):
        fit(tmp_path / "other", Net(), PenaltyCallback(SecondDerivative(share=0.1)), half)


def test_what_does_not_fit_the_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    from rankfold.training.transformers import PenaltyCallback

    with pytest.raises(SiteError, match="'head' · a selection names layers"):
        fit(tmp_path, Net(), PenaltyCallback(NuclearNorm(0.1), NuclearNorm(0.1, only=["head"])))
    sampler = OrderedSampler(to_ordered(Net()))
    with pytest.raises(OptionError, match="a sampler of the layers of the model"):
        fit(tmp_path, to_ordered(Net()), PenaltyCallback(sampler=sampler))


def test_scaled_gradients_are_refused() -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from rankfold.training.transformers import PenaltyCallback

    class Arguments:
        fp16 = True

    arguments: Any = Arguments()
    with pytest.raises(OptionError, match="gradients that are not scaled"):
        PenaltyCallback(NuclearNorm(0.1)).on_train_begin(arguments, TrainerState(), TrainerControl())
    with pytest.raises(OptionError, match="a penalty, or a sampler"):
        PenaltyCallback()
    assert TrainingArguments

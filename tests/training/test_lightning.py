"""Penalties in Lightning's loop are those of a loop of one's own, accumulated, resumed and beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rankfold.errors import OptionError, SiteError
from rankfold.training import HierarchicalLasso, NuclearNorm, OrderedSampler, to_ordered

pytestmark = [pytest.mark.usefixtures("mended_torchvision"), pytest.mark.filterwarnings("ignore")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def data() -> TensorDataset:
    draws = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, 6, generator=draws), torch.randint(4, (24,), generator=draws))


def module(model: nn.Module, **optimizer: Any) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01, **optimizer)

    return Module()


def fit(
    folder: Path,
    model: nn.Module,
    callback: Any,
    epochs: int = 2,
    resume: str | None = None,
    others: Sequence[Any] = (),
    own: bool = False,
    **options: Any,
) -> Any:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *others],
        **options,
    )
    trainer.fit(model if own else module(model), DataLoader(data(), batch_size=4), ckpt_path=resume)
    return trainer


def own(model: nn.Module, penalty: NuclearNorm, accumulate: int, epochs: int = 2) -> None:
    """The same by hand."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        losses: list[Tensor] = []
        for x, y in DataLoader(data(), batch_size=4):
            loss = F.cross_entropy(model(x), y) / accumulate
            loss.backward()
            losses.append(loss.detach())
            if len(losses) == accumulate:
                penalty.add_gradients(model, torch.stack(losses).sum())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                losses.clear()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_the_loop_of_ones_own(accumulate: int, tmp_path: Path) -> None:
    from rankfold.training.lightning import PenaltyCallback

    ours, theirs = network(), network()
    own(ours, NuclearNorm(share=0.5), accumulate)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, "enable_checkpointing": False}
    trainer = fit(tmp_path, theirs, PenaltyCallback(NuclearNorm(share=0.5, only=["model.*"])), **options)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert float(trainer.callback_metrics["penalty/NuclearNorm"]) > 0


def test_stopped_and_resumed_is_not_stopped(tmp_path: Path) -> None:
    from rankfold.training.lightning import PenaltyCallback

    def parts(model: nn.Module) -> PenaltyCallback:
        return PenaltyCallback(HierarchicalLasso(share=0.2), sampler=OrderedSampler(model, seed=5))

    whole, half, rest = (to_ordered(network()) for _ in range(3))
    fit(tmp_path, whole, parts(whole), 2, enable_checkpointing=False)
    trainer = fit(tmp_path, half, parts(half), 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, rest, parts(rest), 2, str(tmp_path / "half.ckpt"), enable_checkpointing=False)
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(layer.sampled is None for layer in rest if hasattr(layer, "sampled"))


def test_what_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from rankfold.training.lightning import PenaltyCallback

    with pytest.raises(OptionError, match="a penalty, or a sampler"):
        PenaltyCallback()
    callback = PenaltyCallback(NuclearNorm(0.1))

    class FSDPStrategy:
        """A strategy of that name, without its processes."""

    class Scaled:
        scaler = object()

    class Trainer:
        strategy, precision_plugin, precision = FSDPStrategy(), Scaled(), "16-mixed"
        optimizers: Any = (torch.optim.Adam(network().parameters(), fused=True),)

    trainer: Any = Trainer()
    with pytest.raises(OptionError, match="a strategy that keeps weights whole"):
        callback.on_fit_start(trainer, pl.LightningModule())
    trainer.strategy = None
    with pytest.raises(OptionError, match="gradients that are not scaled"):
        callback.on_fit_start(trainer, pl.LightningModule())
    trainer.optimizers = [torch.optim.LBFGS(network().parameters(), line_search_fn="strong_wolfe")]
    with pytest.raises(OptionError, match="an optimizer that does not compare losses"):
        callback.on_fit_start(trainer, pl.LightningModule())
    with pytest.raises(SiteError, match="'head' · a selection names layers"):
        fit(tmp_path, network(), PenaltyCallback(NuclearNorm(0.1, only=["head"])), enable_checkpointing=False)
    sampler = OrderedSampler(to_ordered(network()))
    with pytest.raises(OptionError, match="a sampler of the layers of the model"):
        fit(tmp_path, to_ordered(network()), PenaltyCallback(sampler=sampler), enable_checkpointing=False)


def test_the_scale_of_half_precision_is_taken_off_the_loss(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    from rankfold.training.lightning import PenaltyCallback

    found = {}
    for scale in (1.0, 2.0**16):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        callback = PenaltyCallback(NuclearNorm(share=0.1))
        trainer = fit(tmp_path, network(), callback, 1, plugins=plugins, enable_checkpointing=False)
        found[scale] = float(trainer.callback_metrics["penalty/NuclearNorm"])
    assert found[1.0] == pytest.approx(found[2.0**16], rel=0.02)


def test_a_training_that_was_cut_off_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from rankfold.training.lightning import PenaltyCallback

    class Struck(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            raise ValueError("struck")

    model = to_ordered(network())
    fresh = to_ordered(network())
    callback = PenaltyCallback(HierarchicalLasso(share=0.2), sampler=OrderedSampler(model))
    with pytest.raises(ValueError, match="struck"):
        fit(tmp_path, model, callback, others=[Struck()], accumulate_grad_batches=3, enable_checkpointing=False)
    assert all(layer.sampled is None for layer in model if hasattr(layer, "sampled"))
    model.load_state_dict(fresh.state_dict())
    callback.sampler.load_state_dict(OrderedSampler(model).state_dict())
    fit(tmp_path, model, callback, enable_checkpointing=False)
    again = PenaltyCallback(HierarchicalLasso(share=0.2), sampler=OrderedSampler(fresh))
    fit(tmp_path, fresh, again, enable_checkpointing=False)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_optimizers_that_step_on_one_loss_and_batches_without_one(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from rankfold.training.lightning import PenaltyCallback

    class Both(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = network(), False

        def training_step(self, batch: list[Tensor], index: int) -> None:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            (loss.backward if index == 5 else self.manual_backward)(*(() if index == 5 else (loss,)))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(self.model[place].parameters(), 0.01) for place in (0, 2)]

    callback = PenaltyCallback(NuclearNorm(share=0.1))
    with pytest.raises(OptionError, match=r"none since the optimizer stepped · call self\.manual_backward"):
        fit(tmp_path, Both(), callback, own=True, enable_checkpointing=False)

    class Silent(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: list[Tensor], index: int) -> None:
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    silent = Silent()
    fit(tmp_path, silent, PenaltyCallback(NuclearNorm(1.0)), own=True, enable_checkpointing=False)
    assert all(torch.equal(value, network().state_dict()[name]) for name, value in silent.model.state_dict().items())

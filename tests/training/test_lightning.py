"""Penalties in Lightning's loop are those of a loop of one's own, accumulated, resumed and beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rankfold.errors import OptionError
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
    folder: Path, model: nn.Module, callback: Any, epochs: int = 2, resume: str | None = None, **options: Any
) -> Any:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **options,
    )
    trainer.fit(module(model), DataLoader(data(), batch_size=4), ckpt_path=resume)
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
        optimizers = (torch.optim.Adam(network().parameters(), fused=True),)

    trainer: Any = Trainer()
    with pytest.raises(OptionError, match="a strategy that keeps weights whole"):
        callback.on_fit_start(trainer, pl.LightningModule())
    trainer.strategy = None
    with pytest.raises(OptionError, match="gradients that are not scaled"):
        callback.on_fit_start(trainer, pl.LightningModule())

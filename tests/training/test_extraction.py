"""Networks of several sizes from one with ordered layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.digits import calibration, held_out, make_model, trained
from rankfold.errors import BudgetError, OptionError, SiteError
from rankfold.training import Ordered, OrderedSampler, extract, to_ordered


@pytest.fixture(scope="module")
def ordered() -> nn.Module:
    """The digits network after a few steps with the sampler."""
    from rankfold.digits.data import training

    images, labels = training()
    model = to_ordered(trained()).train()
    sampler, optimizer = OrderedSampler(model), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for index in torch.randperm(len(images), generator=generator).split(64):
        sampler.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    sampler.rest()
    return model.eval()


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.96), (0.25, 0.9)])
def test_one_network_serves_many_sizes(ordered: nn.Module, share: float, least: float, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in ordered.state_dict().items()}
    out = extract(ordered, calibration(), rf.Budget(params=share), samples=128)
    assert out.report.after.params <= share * out.report.before.params
    assert out.report.before.params == sum(each.numel() for each in trained().parameters())
    top1 = rf.compare(trained(), out.model, held_out()).top1
    assert top1 is not None
    assert top1[1] > least
    assert not any(isinstance(each, Ordered) for each in out.model.modules())
    rf.save(out, tmp_path / "small")
    again = rf.load(tmp_path / "small", factory=make_model)
    images = calibration()[0]
    assert torch.equal(again(images), out.model(images))
    assert all(torch.equal(each, before[name]) for name, each in ordered.state_dict().items())
    assert all(each.shown is None for each in ordered.modules() if isinstance(each, Ordered))


def test_the_first_ranks_are_kept_exactly(ordered: nn.Module) -> None:
    out = extract(ordered, calibration(), rf.Budget(params=0.4), samples=64, norms=False)
    checked = 0
    for decision in out.plan.changes:
        layer, shell = ordered.get_submodule(decision.site), out.model.get_submodule(decision.site)
        assert isinstance(layer, Ordered)
        rank = decision.rank
        left, right = (part.weight.detach().flatten(1) for part in (layer.second, layer.first))  # type: ignore[operator, union-attr]
        inner, outer = (part.weight.detach().flatten(1) for part in shell.children())  # type: ignore[operator, union-attr]
        torch.testing.assert_close(outer @ inner, left[:, :rank] @ right[:rank], rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked > 3


def test_what_cannot_be(ordered: nn.Module) -> None:
    with pytest.raises(SiteError, match="to_ordered first"):
        extract(trained(), calibration(), rf.Budget(params=0.5))
    with pytest.raises(BudgetError, match="the smallest reachable model"):
        extract(ordered, calibration(), rf.Budget(params=0.001), samples=16)
    with pytest.raises(BudgetError, match=r"use rankfold\.training\.merge_ordered"):
        extract(ordered, calibration(), rf.Budget(params=1.0), samples=16)
    with pytest.raises(OptionError, match=r"extract\.samples"):
        extract(ordered, calibration(), rf.Budget(params=0.5), samples=0)

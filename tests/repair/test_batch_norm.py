"""Re-estimation of batch norms: an option, said in the report, and exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import DataError, NumericsError


class Small(nn.Module):
    """Two convolutions with batch norms, one of which keeps no running moments, and a head with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
        self.head, self.norm3 = nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        y: Tensor = self.norm3(self.head(x.mean((2, 3))))
        return y


def model_and_data() -> tuple[Small, list[Tensor]]:
    torch.manual_seed(0)
    return Small().eval(), list((3 + 2 * torch.randn(60, 3, 8, 8)).split(20))


def test_the_first_norm_gets_the_pooled_moments_of_its_inputs() -> None:
    model, data = model_and_data()
    assert rf.reestimate_batch_norms(model, data) == ["norm1", "norm3"]
    with torch.no_grad():
        values = model.conv1(torch.cat(data)).movedim(1, 0).flatten(1).double()
    assert model.norm1.running_mean is not None
    assert model.norm1.running_var is not None
    torch.testing.assert_close(model.norm1.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm1.running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)


def test_one_batch_gives_what_torch_gives_without_momentum() -> None:
    model, data = model_and_data()
    whole = [torch.cat(data)]
    expected = Small()
    expected.load_state_dict(model.state_dict())
    for norm in (expected.norm1, expected.norm3):
        norm.momentum = None
    expected.train()(whole[0])
    rf.reestimate_batch_norms(model, whole)
    torch.testing.assert_close(model.norm3.running_mean, expected.norm3.running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.norm3.running_var, expected.norm3.running_var, rtol=1e-4, atol=1e-6)


def test_nothing_but_two_buffers_a_norm_changes() -> None:
    model, data = model_and_data()
    model.norm1.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rf.reestimate_batch_norms(model, data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"norm{i}.running_{moment}" for i in (1, 3) for moment in ("mean", "var")}
    assert model.norm1.training
    assert not model.norm3.training
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("value", "error"), [(float("nan"), NumericsError), (None, DataError)])
def test_bad_data_is_refused_and_changes_nothing(value: float | None, error: type[Exception]) -> None:
    model, data = model_and_data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = data[0][:1] if value is None else torch.full_like(data[0], value)
    with pytest.raises(error):
        rf.reestimate_batch_norms(model, [data[0], bad])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_compress_does_it_only_when_asked_and_says_so() -> None:
    model, data = model_and_data()
    kept = model.state_dict()["norm3.running_var"].clone()
    silent = rf.compress(model, data, budget=rf.Budget(params=0.7))
    asked = rf.compress(model, data, budget=rf.Budget(params=0.7), repair=rf.Lockstep(reestimate_batch_norms=True))
    assert torch.equal(silent.model.state_dict()["norm3.running_var"], kept)
    assert not torch.equal(asked.model.state_dict()["norm3.running_var"], kept)
    assert torch.equal(model.state_dict()["norm3.running_var"], kept)
    assert not any("batch norms" in note for note in silent.report.details)
    assert "running moments of 2 batch norms were estimated anew, as asked" in asked.report.details
    again = rf.apply(model, asked.plan, data)
    assert torch.equal(again.state_dict()["norm3.running_var"], asked.model.state_dict()["norm3.running_var"])

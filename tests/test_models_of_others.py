"""Ways to write a model that a reviewer thought of: each is compressed, reloads, and leaves the original as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankfold as rf
from rankfold.errors import ModelError

WIDTH = 24


class Net(nn.Module):
    """Any forward over two linear layers and whatever else a case needs."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def _counted(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.b(F.relu(m.a(x))) / m.calls


def _averaged(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.ema.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return m.b(F.relu(h))


def _cached(m: Any, x: Tensor) -> Tensor:
    m.cache[: len(x)] = m.a(x)
    return m.b(F.relu(m.cache[: len(x)]))


def _queried(m: Any, x: Tensor) -> Tensor:
    scores = (m.a(x)[:, None] * m.a(m.queries)).sum(-1).softmax(-1)
    return m.b(F.relu(m.a(x))) * scores.sum(-1, keepdim=True)


def _positioned(m: Any, x: Tensor) -> Tensor:
    tokens = x[:, None].expand(-1, 5, -1)
    return m.b(F.relu(m.a(tokens) + m.c(F.relu(m.positions)))).mean(1)


def _siamese(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.norm(m.plain(x))) + F.relu(m.norm(m.other(x))))


def _over_tokens(m: Any, x: Tensor) -> Tensor:
    tokens = x[:, None] * torch.linspace(0.5, 1.5, 7)[:, None]
    return m.b(F.relu(m.norm(m.plain(tokens)))).mean(1)


def _over_the_batch(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x.mean(0)))) + m.b(F.relu(m.a(x)))


def _scaled(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) * m.gamma + x


def _sequence_first(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x[:, None].expand(-1, 10, -1).transpose(0, 1))))


def _twelve(width: int) -> nn.Linear:
    return nn.Linear(WIDTH, width, bias=False)


CASES: dict[str, Callable[[], Net]] = {
    "a counter that the output depends on": lambda: Net(_counted, calls=torch.zeros(())),
    "a moving average": lambda: Net(_averaged, ema=torch.zeros(48)),
    "a cache": lambda: Net(_cached, cache=torch.zeros(64, 48)),
    "learned queries through a layer": lambda: Net(_queried, queries=nn.Parameter(torch.randn(4, WIDTH))),
    "a skip branch without a sample axis": lambda: Net(
        _positioned, c=nn.Linear(WIDTH, 48), positions=nn.Parameter(torch.randn(1, 5, WIDTH))
    ),
    "one norm behind two layers": lambda: Net(_siamese, plain=_twelve(48), other=_twelve(48), norm=nn.BatchNorm1d(48)),
    "a batch norm over tokens": lambda: Net(_over_tokens, plain=_twelve(48), norm=nn.BatchNorm1d(7)),
    "a mean over the batch": lambda: Net(_over_the_batch),
    "a layer scale of more axes than the output": lambda: Net(
        _scaled, gamma=nn.Parameter(torch.full((1, 1, WIDTH), 0.5))
    ),
    "samples on the second axis": lambda: Net(_sequence_first),
    "a checkpoint": lambda: Net(lambda m, x: checkpoint(lambda z: m.b(F.relu(m.a(z))), x, use_reentrant=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_compressed_and_left_as_it_was(case: str, tmp_path: Path) -> None:
    def make() -> Net:
        model = CASES[case]().eval()
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model

    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixing = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))
    data = [torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(seed)) @ mixing / 3 for seed in range(3, 8)]
    out = rf.compress(model, data, budget=rf.Budget(params=0.6))
    assert out.report.after.params <= 0.6 * out.report.before.params
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not buffer.requires_grad for buffer in model.buffers())
    copy.deepcopy(model)
    rf.save(out, tmp_path / "small")
    again = rf.load(tmp_path / "small", factory=make)
    with torch.no_grad():
        assert torch.equal(again(data[0]), copy.deepcopy(out.model).eval()(data[0]))


def test_repair_helps_behind_a_batch_norm_over_tokens() -> None:
    model = CASES["a batch norm over tokens"]().eval()
    mixing = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))
    data = [torch.randn(100, 8, generator=torch.Generator().manual_seed(3)) @ mixing / 3]
    errors = {}
    for name, repair in {"with": rf.Lockstep(), "without": None}.items():
        out = rf.compress(model, data, budget=rf.Budget(params=0.6), repair=repair)
        assert out.report.comparison is not None
        errors[name] = out.report.comparison.relative_error
    assert errors["with"] <= errors["without"]


def test_sizes_set_as_bare_ints_are_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten())
    model[2].stride, model[2].padding, model[2].dilation = 2, 1, 1  # type: ignore[assignment]
    data = [torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    out = rf.compress(model.eval(), data, budget=rf.Budget(params=0.6))
    assert out.model(data[0]).shape == model(data[0]).shape


def test_a_table_that_rescales_its_rows_is_refused_before_it_runs() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, WIDTH, max_norm=0.1), nn.Linear(WIDTH, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.words(x).mean(1))
            return y

    model = Words().eval()
    before = model.words.weight.detach().clone()
    with pytest.raises(ModelError, match=r"words\.weight · a forward leaves .* got max_norm=0\.1"):
        rf.compress(model, [torch.randint(50, (20, 6))], budget=rf.Budget(params=0.6))
    assert torch.equal(model.words.weight, before)

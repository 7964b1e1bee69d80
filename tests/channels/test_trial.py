"""Forwards in which channels look removable and are not: what goes must leave the rest as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.channels.trial import removable

Forward = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """Any forward over named layers."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.h, self.q, self.o = 4, nn.Linear(16, 48), nn.Linear(16, 16)
        self.head, self.scale = nn.Linear(16, 5), nn.Parameter(torch.rand(1, 1, 1, 16) + 0.5)
        self.slope = nn.Parameter(torch.tensor([0.2]))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self._forward(self, self.n(self.a(x)).relu()).relu().mean((2, 3)))
        return y


def _heads(m: nn.Module, y: Tensor) -> Tensor:
    tokens = m.b(y).flatten(2).transpose(1, 2)
    q, k, v = m.q(tokens).chunk(3, -1)
    q, k, v = (each.reshape(len(y), -1, m.h, each.shape[-1] // m.h).transpose(1, 2) for each in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    result: Tensor = m.o(attended).transpose(1, 2).unflatten(2, (6, 6))
    return result


WRONG: dict[str, Forward] = {
    "a scale by the width": lambda m, y: m.b(y * y.shape[1] ** -0.5),
    "a branch on the width": lambda m, y: m.b(y if y.shape[1] == 16 else 2 * y),
    "channels that turn round": lambda m, y: m.b(y.roll(1, 1)),
    "a group norm by function": lambda m, y: m.b(F.group_norm(y, 4)),
    "the mean of a weight": lambda m, y: m.b(y) * m.a.weight.abs().mean(),
    "the sum of a bias": lambda m, y: m.b(y) * m.a.bias.sum(),
    "the mean of a norm's weight": lambda m, y: m.b(y) * m.n.weight.mean(),
    "heads under another name": _heads,
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_compute_something_else_stays(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Net(WRONG[kind]).eval(), torch.randn(30, 3, 6, 6)
    sites = rf.find_sites(model, x)
    found, skips = removable(model, list(rf.find_channels(model, sites)), x, any_batch=True)
    wrong = "q" if kind == "heads under another name" else "a"
    assert wrong not in {path for group in found for path in group.made}
    assert all("the model fails without some of them" in why for why in skips.values())
    out = rf.compress(model, [x], budget=rf.Budget(params=0.8))  # and no candidate fails
    assert out.report.after.params <= 0.8 * out.report.before.params


RIGHT: dict[str, Forward] = {
    "a cast to a weight's dtype": lambda m, y: m.b(y.type_as(m.b.weight)),
    "a parameter of four axes": lambda m, y: m.b((y.permute(0, 2, 3, 1) * m.scale).permute(0, 3, 1, 2)),
    "a layer under two names": lambda m, y: m.b(y),
    "one minus a gate": lambda m, y: m.b((1 - y.sigmoid()) * y),
    "a mask by comparison": lambda m, y: m.b(y.masked_fill(y < 0.1, 0.0)),
    "from one to another by a gate": lambda m, y: m.b(torch.lerp(y, y.tanh(), y.sigmoid())),
    "one slope for all": lambda m, y: m.b(F.prelu(y, m.slope)),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_computes_the_same_goes(kind: str, tmp_path: object) -> None:
    def made() -> Net:
        torch.manual_seed(0)
        model = Net(RIGHT[kind]).eval()
        if kind == "a layer under two names":
            model.again, model.norm = model.b, model.n
        return model

    model, x = made(), torch.randn(30, 3, 6, 6)
    out = rf.compress(model, [x], budget=rf.Budget(params=0.8), families=[rf.Interpolative()])
    assert "a" in {decision.group for decision in out.plan.channels}
    rf.save(out, f"{tmp_path}/small")
    again = rf.load(f"{tmp_path}/small", factory=made)
    with torch.no_grad():
        assert torch.equal(again(x), out.model(x))


def test_bits_read_as_another_dtype_freeze() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, y: m.b(y) + (y.contiguous().view(torch.int32) % 2).float()).eval()
    channels = rf.find_channels(model, rf.find_sites(model, torch.randn(2, 3, 6, 6)))
    assert "view is no operator" in next(skip.reason for skip in channels.skips if skip.path == "a")


def test_a_candidate_that_fails_drops_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is kept from finding what it would: then the self-check does, and another candidate is taken."""
    monkeypatch.setattr("rankfold.channels.trial.why_not", lambda *_, **__: None)
    torch.manual_seed(0)
    model, x = Net(WRONG["a scale by the width"]).eval(), torch.randn(60, 3, 6, 6)
    out = rf.compress(model, [x], budget=rf.Budget(params=0.8))
    assert "a.weight" not in out.plan.cuts
    assert any(note.startswith("candidate channels was dropped: ") for note in out.report.notes)
    with pytest.raises(rf.RankfoldError, match="computes what the engine computed"):
        rf.compress(model, [x], budget=rf.Budget(params=0.8), families=[rf.Interpolative()], selector=rf.SameShare())


class Policy(nn.Module):
    """Scaled by its own width; an illegal action, or one of another unit, stands beside the ones that matter."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.masked = masked
        with torch.no_grad():
            self.o.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.a(x).relu()).relu()
        actions: Tensor = self.o(hidden / hidden.shape[-1])
        return actions.masked_fill(x[:, :1] > 0, -1e9) if self.masked else actions


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_by_the_width_is_seen_beside_masked_outputs_and_in_half_precision(
    masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = Policy(masked=masked).eval().to(dtype), torch.randn(40, 10).to(dtype)
    found, skips = removable(model, list(rf.find_channels(model, rf.find_sites(model, x))), x, any_batch=True)
    assert "b" not in {path for group in found for path in group.made}
    assert "it computes something else" in skips["b"]
    assert {group.name for group in found} == {"a"}


class Auxiliary(nn.Module):
    """A head that only training reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.aux = nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        return self.head(y) + self.aux(y) if self.training else self.head(y)  # type: ignore[no-any-return]


def test_a_layer_that_is_not_called_and_stays_as_wide_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 10)
    for families, said in (([rf.Interpolative()], True), ([rf.SVD()], False)):
        out = rf.compress(Auxiliary().eval(), [x], budget=rf.Budget(params=0.7), families=families)
        assert any("as wide as before, though channels went: aux," in note for note in out.report.notes) == said


def test_frozen_parameters_stay_frozen_one_by_one() -> None:
    torch.manual_seed(0)
    model = Auxiliary().eval()
    model.b.bias.requires_grad_(False)
    model.a.weight.requires_grad_(False)
    for repair in (rf.Lockstep(), None):
        out = rf.compress(
            model,
            [torch.randn(40, 10)],
            budget=rf.Budget(params=0.4),
            families=[rf.SVD()],
            selector=rf.Uniform(),  # which cuts both layers
            repair=repair,
        )
        own = {name: parameter.requires_grad for name, parameter in out.model.named_parameters()}
        assert (own["a.0.weight"], own["a.1.weight"], own["a.1.bias"]) == (False, False, True)
        assert (own["b.0.weight"], own["b.1.weight"], own["b.1.bias"]) == (True, True, False)

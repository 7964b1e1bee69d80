"""Decisions of two classifiers, example by example, against the definitions."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.comparison.corruptions import CORRUPTIONS, Blur, Brightness, Noise
from rankfold.errors import DataError, NumericsError, OptionError, TraceError


class Table(nn.Module):
    """Logits looked up by the first element of the input."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x[:, 0].round().long()]  # type: ignore[index, no-any-return]


FIRST = Table([[4.0, 0, 0], [0, 4, 0], [1, 1.5, 0], [0, 0, 3]])
SECOND = Table([[4.0, 0, 0], [0, 4, 0], [2, 1.5, 0], [0, 0, 3]])
INPUTS = torch.arange(4.0)[:, None].repeat(1, 2)
LABELS = torch.tensor([0, 1, 1, 2])


def test_changes_classes_and_margins_are_those_of_the_tables() -> None:
    seen = rf.agreement(FIRST, SECOND, [(INPUTS[:3], LABELS[:3]), (INPUTS[3:], LABELS[3:])], corruptions=[])
    assert seen.examples == 4
    assert seen.agreement == 0.75
    (change,) = seen.changes
    assert (change.index, change.original, change.compressed, change.label) == (2, 1, 0, 1)
    p = torch.tensor([1.0, 1.5, 0]).double().softmax(0)
    assert change.margin == pytest.approx(float(p[1] - p[0]))
    assert seen.changed_margin == change.margin
    assert seen.margin > change.margin
    by_class = {each.name: each for each in seen.classes}
    assert (by_class[0].examples, by_class[0].lost, by_class[0].gained, by_class[0].top1) == (1, 0, 1, (1.0, 1.0))
    assert (by_class[1].examples, by_class[1].lost, by_class[1].gained, by_class[1].top1) == (2, 1, 0, (1.0, 0.5))
    assert seen.corrupted == {}
    assert seen.adversarial is None
    json.dumps(seen.to_json())


def test_without_labels_there_is_no_top1() -> None:
    seen = rf.agreement(FIRST, FIRST, [INPUTS], corruptions=[])
    assert seen.agreement == 1
    assert seen.changes == ()
    assert seen.changed_margin is None
    assert all(each.top1 is None and each.lost == each.gained == 0 for each in seen.classes)


def _pair() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    other.load_state_dict({name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()})
    return model, other, torch.randn(60, 3, 8, 8)


def test_corruptions_and_attacks_are_the_same_in_every_run_and_leave_the_models() -> None:
    model, other, images = _pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = images.clone()
    seen = rf.agreement(model, other, images.split(20), fgsm=0.1)
    assert seen == rf.agreement(model, other, images.split(20), fgsm=0.1)
    assert list(seen.corrupted) == [corruption.name for corruption in CORRUPTIONS]
    assert torch.equal(images, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_attack_fools_and_a_model_agrees_with_itself_under_it() -> None:
    model, _, images = _pair()
    seen = rf.agreement(model, model, [images], fgsm=0.3)
    assert seen.adversarial == (1.0, 1.0)
    assert all(agreement == 1 for agreement in seen.corrupted.values())
    assert seen.fooled is not None
    assert seen.fooled[0] == seen.fooled[1] > 0.3
    weaker = rf.agreement(model, model, [images], fgsm=0.01)
    assert weaker.fooled is not None
    assert weaker.fooled[0] < seen.fooled[0]


def test_corruptions_do_what_they_say() -> None:
    images = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(2)
    noisy = Noise(0.5).apply(images, draws)
    assert float((noisy - images).std() / images.std()) == pytest.approx(0.5, rel=0.1)
    brighter = Brightness(-0.3).apply(images, draws)
    torch.testing.assert_close(brighter, images - 0.3 * images.std())
    blurred = Blur(1.0).apply(images, draws)
    assert float(blurred.std()) < 0.6 * float(images.std())
    flat = torch.full((1, 2, 9, 9), 3.0)
    torch.testing.assert_close(Blur(1.5).apply(flat, draws), flat)


def test_bad_input_is_refused_by_name() -> None:
    model, other, images = _pair()
    with pytest.raises(OptionError, match=r"Noise\.strength"):
        Noise(0)
    with pytest.raises(OptionError, match=r"Blur\.sigma"):
        Blur(-1)
    with pytest.raises(OptionError, match=r"Brightness\.shift"):
        Brightness(0)
    with pytest.raises(OptionError, match="corruptions"):
        rf.agreement(model, other, [images], corruptions=["noise"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="fgsm"):
        rf.agreement(model, other, [images], fgsm=0)
    with pytest.raises(DataError, match="a blur works on images"):
        rf.agreement(FIRST, SECOND, [INPUTS])
    with pytest.raises(DataError, match="samples × classes"):
        rf.agreement(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), [images])
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(DataError, match="inputs of whole numbers"):
        rf.agreement(words, words, [torch.zeros(4, 2, dtype=torch.int64)])
    with pytest.raises(DataError, match="at least one batch"):
        rf.agreement(model, other, [])


class Anything(nn.Module):
    """Any forward."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self._forward = nn.Linear(6, 3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self._forward(x))  # type: ignore[no-any-return]


def test_a_forward_that_writes_into_its_input_is_attacked_like_another() -> None:
    torch.manual_seed(0)
    plain = Anything(lambda x: x * 2)
    writes = Anything(lambda x: x.mul_(2))
    writes.load_state_dict(plain.state_dict())
    x = torch.randn(40, 6)
    seen = [rf.agreement(each, each, [x.clone()], corruptions=[], fgsm=0.3) for each in (plain, writes)]
    assert seen[0] == seen[1]
    assert seen[0].fooled is not None
    assert seen[0].fooled[0] > 0


def test_what_cannot_be_judged_is_refused() -> None:
    x = torch.randn(8, 6)
    plain, lost = Anything(lambda x: x), Anything(lambda x: x * float("nan"))
    cut, breaks = Anything(lambda x: x.detach()), Anything(lambda x: x.reshape(3, 3))
    for first, second, whose in ((plain, lost, "compressed"), (lost, plain, "original")):
        with pytest.raises(NumericsError, match=f"output of the {whose} model · every output is finite"):
            rf.agreement(first, second, [x], corruptions=[])
    with pytest.raises(DataError, match="differentiates the outputs by the first floating input"):
        rf.agreement(cut, cut, [x], corruptions=[], fgsm=0.1)
    with pytest.raises(TraceError, match="from the compressed model"):
        rf.agreement(plain, breaks, [x], corruptions=[])
    with pytest.raises(OptionError, match=r"each corruption once · got 'noise 0\.1' twice"):
        rf.agreement(plain, plain, [x], corruptions=[Noise(0.1), Noise(0.1)])

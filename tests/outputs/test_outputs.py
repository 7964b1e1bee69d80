"""Laws of outputs: every tensor counts by name, and each by what it is."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import DataError, OptionError, PlanError
from rankfold.outputs.taken import opened, outputs_from_json, outputs_to_json, settle, settled
from rankfold.statistics.collect import collect
from rankfold.statistics.gradients import collect_gradients


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Gives(nn.Module):
    """Gives one output, whatever comes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


@dataclass
class Boxes:
    scores: Tensor
    corners: Tensor


class Cache:
    """Holds tensors that nothing can open."""

    def __init__(self) -> None:
        self.keys = draw(4, 2)


Pair = namedtuple("Pair", "left right")
T = draw(4, 3)
X = [torch.zeros(4, 1)]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (T, ["output"]),
        ({"cls": T, "feats": [T, T]}, ["cls", "feats[0]", "feats[1]"]),
        ((T, (T, T)), ["[0]", "[1][0]", "[1][1]"]),
        ({"head": {"boxes": Boxes(T, T)}}, ["head.boxes.scores", "head.boxes.corners"]),
        (Boxes(T, T), ["scores", "corners"]),
        (Pair(T, [T]), ["left", "right[0]"]),
        ({0: T, "a": (T,)}, ["[0]", "a[0]"]),
    ],
)
def test_every_tensor_of_a_nested_output_counts_by_name(output: Any, names: list[str]) -> None:
    seen = rf.compare(Gives(output), Gives(output), X)
    assert [each.name for each in seen.outputs] == names
    assert seen.passed == ()


def test_an_error_deep_in_an_output_is_seen() -> None:
    other = (T, (T, 1.5 * T))
    seen = rf.compare(Gives((T, (T, T))), Gives(other), X, outputs=rf.Values())
    assert [each.relative_error for each in seen.outputs] == pytest.approx([0, 0, 0.25])
    assert seen.divergence == pytest.approx(0.25 / 3)


def test_what_is_not_looked_at_is_named() -> None:
    output = {"logits": T, "past_key_values": ((T, T),), "hidden_states": (T,), "cache": Cache(), "loss": T.mean()}
    found = settled(Gives(output), X)
    assert list(found.kinds) == ["logits"]
    assert found.passed == (
        "past_key_values[0][0] (an auxiliary entry)",
        "past_key_values[0][1] (an auxiliary entry)",
        "hidden_states[0] (an auxiliary entry)",
        "loss (an auxiliary entry)",
        "cache (a Cache)",
    )
    classes = settled(Gives((T, T.argmax(1), T.sum())), X)
    assert classes.passed == ("[2] (one number for the whole batch)", "[1] (a int64 tensor)")


def test_what_is_auxiliary_elsewhere_counts_where_it_is_all_there_is() -> None:
    assert list(settled(Gives({"hidden_states": T}), X).kinds) == ["hidden_states"]
    assert list(settled(Gives({"loss": T.sum()}), X).kinds) == ["loss"]
    with pytest.raises(DataError, match=r"returns a floating tensor.* · got a Cache"):
        settled(Gives(Cache()), X)


def test_a_mapping_says_what_each_output_is_and_what_is_left_out() -> None:
    output = {"cls": T, "box": T, "pooled": T, "hidden_states": T}
    asked = {"cls": rf.Embedding(), "pooled": None, "hidden_states": rf.Values()}
    found = settled(Gives(output), X, asked)
    assert found.kinds == {"cls": rf.Embedding(), "box": rf.Values(), "hidden_states": rf.Values()}
    assert found.guessed == {"box"}
    assert found.passed == ("pooled (left out as asked)",)
    seen = rf.compare(Gives(output), Gives(output), X, outputs=asked)
    assert seen.taken_for == "cls: embedding, box: values (guessed), hidden_states: values"
    assert seen.passed == found.passed
    with pytest.raises(DataError, match=r"outputs\['boxes'\] · the name of an output .* 'box'"):
        settled(Gives(output), X, {"boxes": rf.Values()})


@pytest.mark.parametrize("wrong", ["logits", 3, {"a": "logits"}, {1: rf.Values()}, rf.Logits])
def test_what_says_nothing_about_outputs_is_refused(wrong: Any) -> None:
    for call in (
        lambda: rf.compare(nn.Identity(), nn.Identity(), [T], outputs=wrong),
        lambda: rf.compress(nn.Linear(3, 3), [T], budget=rf.Budget(params=0.5), outputs=wrong),
    ):
        with pytest.raises(OptionError, match=r"outputs · an instance of Logits, Values or Embedding"):
            call()


@pytest.mark.parametrize(
    "options", [{"axis": 0}, {"axis": 1.0}, {"softening": 2}, {"softening": True}, {"judged": -0.1}, {"temperature": 0}]
)
def test_options_of_logits_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        rf.Logits(**options)


@pytest.mark.parametrize("output", [draw(4), draw(4, 1), draw(4, 1, 2, 2)])
@pytest.mark.parametrize("kind", [rf.Logits(), rf.Embedding()])
def test_an_output_that_cannot_be_what_it_is_said_to_be_is_refused(output: Tensor, kind: rf.Output) -> None:
    with pytest.raises(DataError, match=r"output 'output' · at least 2 entries along the last axis"):
        rf.compare(Gives(output), Gives(output), X, outputs=kind)


SHIFTING = draw(40, 6) + 2 * draw(40, 1, seed=1)
CENTRED = SHIFTING - SHIFTING.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CENTRED, rf.Logits()),
        (SHIFTING, rf.Values()),
        (SHIFTING.log_softmax(1), rf.Logits()),
        (F.normalize(SHIFTING, dim=1), rf.Embedding()),
        (F.one_hot(torch.arange(40) % 6).float(), rf.Logits()),
        ({"image_embeds": CENTRED}, rf.Embedding()),
        ({"pooler_output": CENTRED}, rf.Values()),
        ({"last_hidden_state": draw(4, 5, 6)}, rf.Values()),
        ({"start_logits": SHIFTING}, rf.Logits()),
        ({"logits": draw(2, 3, 4, 4)}, rf.Logits()),
        (draw(2, 3, 4, 4), rf.Values()),
        (draw(4), rf.Values()),
    ],
)
def test_what_is_guessed(output: Any, expected: rf.Output) -> None:
    found = settled(Gives(output), X)
    assert list(found.kinds.values()) == [expected]
    assert len(found.guessed) == 1


def test_outputs_are_compared_by_what_could_change_a_decision() -> None:
    z = torch.tensor([[4.0, 3.0, -2.0, -5.0]]).expand(12, 4)
    likely, unlikely = (z + move for move in (torch.tensor([0, 0.5, 0, 0]), torch.tensor([0, 0, 0, 0.5])))

    def apart(kind: rf.Output, compressed: Tensor) -> float:
        return rf.compare(Gives(z), Gives(compressed), X, outputs=kind).divergence

    assert apart(rf.Logits(judged=1.0), likely) == pytest.approx(apart(rf.Logits(judged=1.0), unlikely))
    assert apart(rf.Logits(), likely) > 1.5 * apart(rf.Logits(), unlikely)
    assert apart(rf.Logits(judged=0.0), unlikely) < 0.01 * apart(rf.Logits(judged=0.0), likely)
    assert apart(rf.Logits(), likely + 3) == pytest.approx(apart(rf.Logits(), likely))


def test_softening_of_1_is_centred_noise_bit_by_bit() -> None:
    noise = draw(9, 7)
    assert torch.equal(rf.Logits().direction(draw(9, 7), noise), noise - noise.mean(-1, keepdim=True))


def test_a_name_with_one_class_is_no_logits() -> None:
    assert settled(Gives({"logits": draw(4, 1)}), X).kinds == {"logits": rf.Values()}


@pytest.mark.parametrize(
    ("shape", "label", "expected"),
    [
        ((4, 3), (4,), rf.Logits()),
        ((4, 5, 3), (4, 5), rf.Logits()),
        ((4, 3, 5), (4, 5), rf.Logits(axis=1)),
        ((4, 3, 5, 5), (4, 5, 5), rf.Logits()),
        ((4, 5, 5, 3), (4, 5, 5), rf.Logits(axis=3)),
        ((4, 5, 3), (4,), rf.Values()),
    ],
)
def test_labels_tell_which_axis_is_that_of_classes(
    shape: tuple[int, ...], label: tuple[int, ...], expected: rf.Output
) -> None:
    found = settle([opened(5 + draw(*shape))], None, [torch.zeros(label, dtype=torch.int64)])
    assert found.kinds == {"output": expected}
    assert found.guessed == {"output"}


def test_a_shift_of_all_logits_changes_neither_divergence_nor_decisions() -> None:
    first, second = draw(40, 5), draw(40, 5) + 0.3 * draw(40, 5, seed=1)
    plain, shifted = (
        rf.compare(Gives(first), Gives(second + shift), [torch.zeros(40, 1)], outputs=rf.Logits())
        for shift in (0, 10 * draw(40, 1, seed=2))
    )
    assert shifted.divergence == pytest.approx(plain.divergence, rel=1e-4)
    assert shifted.agreement == plain.agreement
    assert shifted.kl == pytest.approx(plain.kl, rel=1e-4)
    assert shifted.relative_error > 10 * plain.relative_error


def test_agreement_and_kl_are_of_logits_alone() -> None:
    for kind in (rf.Values(), rf.Embedding()):
        seen = rf.compare(Gives(T), Gives(T), X, outputs=kind)
        assert (seen.agreement, seen.kl, seen.logits, seen.changed) == (None, None, False, ())


def test_maps_are_decided_over_classes_and_never_over_width() -> None:
    first, second = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    data = [(torch.zeros(2, 1), first.argmax(1))]
    seen = rf.compare(Gives(first), Gives(second), data, outputs=rf.Logits(axis=1))
    assert seen.agreement == pytest.approx(float((first.argmax(1) == second.argmax(1)).double().mean()))
    assert seen.examples == 2 * 4 * 5
    assert seen.top1 == (1.0, seen.agreement)
    assert seen.perplexity is None
    expected = F.kl_div(second.log_softmax(1), first.softmax(1), reduction="sum") / 40
    assert seen.kl == pytest.approx(float(expected), rel=1e-4)


def test_embeddings_differ_by_their_cosine() -> None:
    first, second = draw(4, 6), draw(4, 6, seed=1)
    seen = rf.compare(Gives(first), Gives(second * 3), X, outputs=rf.Embedding())
    expected = float(F.cosine_similarity(first, second).mean())
    assert seen.outputs[0].cosine == pytest.approx(expected, rel=1e-5)
    assert seen.divergence == pytest.approx(1 - expected, rel=1e-5)
    assert rf.compare(Gives(first), Gives(first), X, outputs=rf.Embedding()).divergence == 0
    zeros = torch.zeros(4, 6)
    assert rf.compare(Gives(first), Gives(zeros), X, outputs=rf.Embedding()).divergence == 1
    assert rf.compare(Gives(zeros), Gives(zeros), X, outputs=rf.Embedding()).divergence == 0


@pytest.mark.parametrize("softening", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_directions_of_logits_have_the_softened_fisher_metric(softening: float, temperature: float) -> None:
    kind = rf.Logits(softening=softening, temperature=temperature)
    z = torch.tensor([2.0, 0.5, -1.0, -3.0]).expand(100_000, 4)
    v = kind.direction(z, draw(100_000, 4)).double()
    q = (1 - softening) * (z[0].double() / temperature).softmax(0) + softening / 4
    metric = 4 * (q.diag() - torch.outer(q, q))
    torch.testing.assert_close(v.T @ v / len(v), metric, rtol=0, atol=0.03)
    one = z[:1]
    assert float(kind.size(one)) == pytest.approx(
        math.sqrt(float(one[0].double() @ metric @ one[0].double())), rel=1e-4
    )


def test_directions_of_embeddings_are_the_gradient_of_the_unit_vector() -> None:
    z, g = draw(5, 7).requires_grad_(), draw(5, 7, seed=1)
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * g).sum(), z)
    torch.testing.assert_close(rf.Embedding().direction(z.detach(), g), expected)
    assert bool(rf.Embedding().direction(torch.zeros(2, 3), draw(2, 3)).isfinite().all())


def _gram(model: nn.Module, x: Tensor, outputs: Any = None) -> Tensor:
    sites = rf.find_sites(model, x)
    stats = collect(model, [x], sites=sites)
    assert collect_gradients(model, [x], stats, sites=sites, outputs=outputs) is None
    return stats.sites["0" if "0" in stats.sites else sites.sites[0].path]["gradient-gram"].mean()


class Deep(nn.Module):
    """A body with an output that nests."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.side, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).relu()
        return {"cls": self.head(h), "feats": [self.side(h)]}


def test_the_weighting_reaches_what_only_a_nested_output_reads() -> None:
    model, x = Deep().eval(), draw(64, 8)
    sites = rf.find_sites(model, x)
    stats = collect(model, [x], sites=sites)
    assert collect_gradients(model, [x], stats, sites=sites) is None
    assert "unreached" not in stats.manifest


def test_what_the_outputs_are_goes_into_the_weighting() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    x = draw(64, 6)
    grams = [_gram(model, x, kind) for kind in (rf.Logits(), rf.Logits(softening=0.1), rf.Values(), rf.Embedding())]
    assert all(not torch.allclose(a, b) for i, a in enumerate(grams) for b in grams[:i])


def test_what_was_asked_is_in_the_plan_and_carried_out_again() -> None:
    model, x = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)).eval(), [draw(60, 12)]
    asked = rf.Embedding()
    out = rf.compress(model, x, budget=rf.Budget(params=0.5), outputs=asked, selector=rf.Lagrangian())
    assert outputs_from_json(out.plan.calibration["outputs"], "plan") == asked
    again = rf.execute(model, x, rf.Plan.from_json(out.plan.to_json()))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), out.model.parameters(), strict=True))
    applied = rf.apply(model, out.plan, x)
    assert all(torch.equal(a, b) for a, b in zip(applied.parameters(), out.model.parameters(), strict=True))
    assert again.report.comparison == out.report.comparison
    assert "outputs taken for: embedding\n" in out.report.text()
    assert "mean cosine" in out.report.text()
    assert "agreement" not in out.report.text()
    guessed = rf.compress(model, x, budget=rf.Budget(params=0.5), selector=rf.Lagrangian())
    assert "(guessed)\n" in guessed.report.text()
    assert "outputs" not in guessed.plan.calibration


def test_what_was_asked_goes_through_json() -> None:
    for asked in (None, rf.Logits(softening=0.5), {"a": rf.Logits(axis=1), "b": None}):
        assert outputs_from_json(outputs_to_json(asked), "plan") == asked
    with pytest.raises(PlanError, match=r"plan\.calibration\.outputs"):
        outputs_from_json([1], "plan.calibration.outputs")

"""Laws of the shipped network: small, as accurate as its card says, and rebuilt without touching global state."""

import torch

from rankfold.digits import DigitNet, held_out, make_model, trained
from rankfold.digits.model import WEIGHTS, card
from rankfold.digits.train import correct


def test_the_weights_file_is_smaller_than_500_000_bytes() -> None:
    assert WEIGHTS.stat().st_size < 500_000


def test_the_shipped_weights_have_the_accuracy_of_their_card() -> None:
    right, total = correct(trained())
    assert total == card()["test"]
    assert abs(right - card()["test_correct"]) <= 1  # another machine may round one scan to the other side
    assert card()["test_accuracy"] == round(card()["test_correct"] / card()["test"], 4)


def test_at_least_98_percent_of_the_held_out_scans_are_read_rightly() -> None:
    right, total = correct(trained())
    assert right / total >= 0.98


def test_the_trained_network_is_in_eval_mode_and_has_the_size_of_its_card() -> None:
    model = trained()
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == card()["params"]


def test_building_the_network_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    make_model(seed=3)
    trained()
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_seed_gives_the_same_initial_weights_and_another_seed_others() -> None:
    first, second, other = (make_model(seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_every_scan_gets_ten_logits() -> None:
    images, _ = held_out()[0]
    assert DigitNet(widths=(4, 8), blocks=2).eval()(images).shape == (len(images), 10)

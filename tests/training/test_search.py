"""Ranks by a mixture of candidates: how candidates contract, what the mixture is, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import DataError, NumericsError, OptionError
from rankfold.testing.matrices import normal
from rankfold.training import search
from rankfold.training.mixture import Mixture
from rankfold.training.search import contracted

TRAIN = rf.TensorTrain(separable=False, tied=True, whitened=False)
Data = list[tuple[torch.Tensor, torch.Tensor]]


def network(rank: int | None = None) -> nn.Sequential:
    """Two convolutions and a head; the weight of the first is of a low rank along both channels, if it is given."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 12, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    if rank is not None:
        out, inner = (torch.linalg.qr(normal(12, rank, seed=seed))[0].float() for seed in (0, 1))
        core = normal(rank, rank, 3, 3, seed=2).float()
        with torch.no_grad():
            model[0].weight.copy_(torch.einsum("ob,bakl,ia->oikl", out, core, inner))
    return model.eval()


def labelled(model: nn.Module, count: int = 64) -> Data:
    """Inputs with the decisions of a network as labels."""
    inputs = torch.randn(count, 12, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    return list(zip(inputs.split(16), labels.split(16), strict=True))


def test_candidates_contract_as_in_the_example_of_the_authors() -> None:
    """100…800 in steps of 100 → 200 → 150…250 in steps of 10 → 240 → 235…245 in steps of 1."""
    assert contracted(200, 100, 10) == tuple(range(150, 251, 10))
    assert contracted(240, 10, 10) == tuple(range(235, 246))
    assert contracted(3, 10, 10) == tuple(range(1, 9))


def test_rounds_go_from_coarse_to_fine() -> None:
    model = network()
    found = search(model, labelled(model), method=rf.SVD(), ranks=range(2, 13, 2), factor=2, steps=2, warm_up=1)
    assert found.history[0]["0"][0] == (2, 4, 6, 8, 10, 12)
    assert len(found.history) == 2  # steps of 2, then of 1; a half is below 1
    first, second = found.history
    for path, most in (("0", 12), ("2", 8)):
        ranks, chances = first[path]
        best = ranks[chances.index(max(chances))]
        assert second[path][0] == tuple(rank for rank in contracted(best, 2, 2) if rank <= most)
    assert first["5"][0] == second["5"][0] == (2,)  # a single candidate has nothing to contract
    assert all(sum(chances) == pytest.approx(1) for round_ in found.history for _, chances in round_.values())


def test_the_mixture_is_the_sum_of_its_candidates() -> None:
    site = rf.find_sites(network(), torch.randn(1, 12, 6, 6)).at("0")
    weight = network()[0].weight.detach().double()[None]
    mixture = Mixture("0", site, weight, rf.SVD(), (2, 5), "rank")
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.3, -0.4]))
    chances = torch.tensor([0.3, -0.4], dtype=torch.float64).softmax(0)
    from rankfold.decompositions import Moments

    own = [rf.SVD().decompose(weight[0], rank, Moments()).reconstruct() for rank in (2, 5)]
    torch.testing.assert_close(mixture.mixed()[0].detach(), chances[0] * own[0] + chances[1] * own[1])
    assert float(mixture.price().detach()) == pytest.approx(float(chances[0] * 2 / 5 + chances[1]))
    by_params = Mixture("0", site, weight, rf.SVD(), (2, 5), "params")
    assert by_params.costs.tolist() == pytest.approx([2 * (108 + 12) / 1296, 5 * (108 + 12) / 1296])


@pytest.mark.parametrize("method", [TRAIN, rf.CP(whitened=False), rf.SVD()], ids=["train", "cp", "svd"])
def test_it_ends_in_a_plan_that_is_decomposed_afresh(method: rf.Decomposition) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = search(model, labelled(model), method=method, ranks=(2, 4, 6), steps=4, warm_up=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {decision.site for decision in found.plan.decisions} == {"0", "2", "5"}
    small = rf.apply(model, found.plan)
    for decision in found.plan.changes:
        rank = decision.rank
        expected = (found.ranks[decision.site],) * 2 if method == TRAIN else found.ranks[decision.site]
        assert rank == expected
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
    assert rf.Plan.from_json(found.plan.to_json()) == found.plan


def test_a_planted_rank_is_enough() -> None:
    """With a price, no more ranks than there are; by the error of the weights, without labels."""
    model = network(rank=3)
    found = search(
        model,
        labelled(model),
        method=TRAIN,
        ranks={"0": [1, 3, 5, 7, 9]},
        factor=4,
        steps=60,
        warm_up=5,
        labels=False,
        logit_rate=3.0,
    )
    assert list(found.ranks) == ["0"]
    assert 3 <= found.ranks["0"] <= 5


def test_a_higher_price_keeps_fewer_ranks() -> None:
    model = network()
    data = labelled(model)
    sizes = [
        sum(search(model, data, method=rf.SVD(), ranks=(2, 5, 8), factor=9, steps=30, beta=beta).ranks.values())
        for beta in (0.05, 3.0)
    ]
    assert sizes[1] <= sizes[0]


def test_nan_is_an_error_and_never_a_rank() -> None:
    model = network()
    data = labelled(model)
    data[0][0][3, 0, 0, 0] = float("nan")
    with pytest.raises((NumericsError, DataError), match="finite"):
        search(model, data, method=rf.SVD(), ranks=(2, 4), steps=8, warm_up=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": rf.WhitenedSVD()}, r"search\.method"),
        ({"ranks": (0, 3)}, r"search\.ranks"),
        ({"ranks": (1.5, 3)}, r"search\.ranks"),
        ({"ranks": (500, 600)}, r"search\.ranks"),
        ({"ranks": {"nope": (2, 3)}}, r"search\.ranks"),
        ({"method": "cp"}, r"search\.method"),
        ({"ranks": 5}, r"search\.ranks"),
        ({"factor": 1}, r"search\.factor"),
        ({"price": "flops"}, r"search\.price"),
        ({"steps": 0}, r"search\.steps"),
        ({"gamma": 0.0}, r"search\.gamma"),
        ({"clip": -1.0}, r"search\.clip"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    model = network()
    with pytest.raises(OptionError, match=said):
        search(model, labelled(model), **{"method": rf.SVD(), "ranks": (2, 4), "steps": 2, **options})


def test_labels_are_asked_for() -> None:
    model = network()
    inputs = [batch for batch, _ in labelled(model)]
    with pytest.raises(DataError, match="batches with integer labels"):
        search(model, inputs, method=rf.SVD(), ranks=(2, 4), steps=2)
    assert search(model, inputs, method=rf.SVD(), ranks=(2, 4), steps=2, labels=False).ranks


def test_no_gradient_is_left_behind() -> None:
    model = network()
    nn.functional.cross_entropy(model(labelled(model)[0][0]), labelled(model)[0][1]).backward()
    before = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    search(model, labelled(model), method=rf.SVD(), ranks=(2, 4), steps=2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[name])


def test_tables_stay_and_attention_is_split() -> None:
    torch.manual_seed(0)
    language = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)).eval()
    ids = torch.randint(0, 20, (8, 5))
    assert set(search(language, [(ids, ids)], method=rf.SVD(), ranks=(2, 4), steps=2).ranks) == {"1", "2"}
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    found = search(attention, [torch.randn(4, 5, 16)], method=rf.SVD(), ranks=(2, 4), steps=2, labels=False)
    assert "self_attn.q" in found.ranks
    assert rf.apply(attention, found.plan)(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_classes_may_be_second() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x, y = torch.randn(4, 3, 6, 6), torch.randint(0, 4, (4, 6, 6))
    assert search(model, [(x, y)], method=rf.SVD(), ranks=(2, 3), steps=2).ranks
    with pytest.raises(DataError, match="one label for each row of scores"):
        search(model, [(x, y[:, :3])], method=rf.SVD(), ranks=(2, 3), steps=2)

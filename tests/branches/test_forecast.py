"""Forecasts of plans that remove branches."""

from __future__ import annotations

from tests.reference.branching import inputs, made

import rankfold as rf


def test_the_smallest_size_is_that_without_any_branch() -> None:
    model, data = made("norms before"), inputs("norms before")
    found = rf.compress(model, data, budget=rf.Budget(params=0.5), families=[rf.Branches()], dry_run=True)
    head = sum(parameter.numel() for parameter in model.get_submodule("head").parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if ".norm" in name)
    assert head <= found.smallest["params"] <= head + norms

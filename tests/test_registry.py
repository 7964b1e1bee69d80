"""Laws of names: one class each, and only what can be written to JSON and read back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import rankfold as rf
from rankfold.errors import RegistryError
from rankfold.registry import from_json, names, to_json


def test_what_is_no_dataclass_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"plain · a frozen dataclass · got Plain, which is no dataclass · write @"):

        @rf.register("plain")
        class Plain(rf.SVD):  # inherits being one, but an option of its own would be none
            share: float = 0.5

    assert "plain" not in names(rf.SVD)


def test_a_dataclass_that_can_be_changed_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"^mutable · a frozen dataclass · got Mutable, which is not frozen"):

        @rf.register("mutable")
        @dataclass
        class Mutable:
            share: float = 0.5

    assert "mutable" not in names(object)


def test_the_decorators_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(RegistryError, match="between @register and the class"):

        @dataclass(frozen=True)
        @rf.register("upside-down")
        class UpsideDown:
            share: float = 0.5


def test_every_registered_method_survives_json() -> None:
    for name in names(rf.Family):
        method = from_json({"name": name}, rf.Family, place="test")
        assert from_json(to_json(method), rf.Family, place="test") == method

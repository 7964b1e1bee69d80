"""The outcome of a plan that was carried out, on disk: the result, or the error by which the plan dropped out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rankfold.errors import CheckpointError, NumericsError, PlanError, RankfoldError, SelfCheckError
from rankfold.serialization import canonical_json, read_json, write_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")

# Errors by which a plan drops out in every run; others, such as a failed allocation, may not occur the next time.
LASTING: dict[str, type[RankfoldError]] = {each.__name__: each for each in (SelfCheckError, PlanError, NumericsError)}


def kept_result(file: Path, kind: type[T], work: Callable[[], T]) -> T:
    """A flat dataclass from its file, or computed now and written there; a lasting error likewise.

    Numbers come back with the same bits. A file that is damaged, or of other fields, counts as missing.

    Args:
        file: The file.
        kind: The dataclass, of numbers, strings, None, and tuples and string-keyed dicts of these.
        work: Function that computes the result.

    Raises:
        SelfCheckError, PlanError, NumericsError: Raised by `work`, now or when the file was written.
        TypeError: The result holds something else.
    """
    try:
        content = _read(file)
        if "failed" in content:
            failed = content["failed"]
            error = LASTING[failed["kind"]](**{name: failed[name] for name in ("place", "law", "got", "cure")})
        else:
            return kind(**{name: _decoded(value) for name, value in content["result"].items()})
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        error = None
    if error is not None:
        raise error
    try:
        result = work()
    except tuple(LASTING.values()) as cause:
        if type(cause).__name__ in LASTING and isinstance(cause, RankfoldError):
            words = {"place": cause.place, "law": cause.law, "got": cause.got, "cure": cause.cure}
            _write(file, {"failed": {"kind": type(cause).__name__, **words}})
        raise
    _write(file, {"result": {each.name: _encoded(getattr(result, each.name)) for each in fields(result)}})
    return result


def _write(file: Path, content: dict[str, Any]) -> None:
    write_file(file, canonical_json({"sha256": _sha256(content), "content": content}).encode())


def _read(file: Path) -> dict[str, Any]:
    head = read_json(file)
    content: dict[str, Any] = head["content"]
    if head["sha256"] != _sha256(content):
        raise ValueError("altered")
    return content


def _sha256(content: object) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _encoded(value: Any) -> Any:
    """JSON from which `_decoded` makes an equal value; floats are kept by their bits, since they may be infinite."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, (tuple, list)):
        return {"items": [_encoded(each) for each in value]}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"entries": {name: _encoded(each) for name, each in value.items()}}
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "float":
        return float.fromhex(inner)
    if kind == "items":
        return tuple(_decoded(each) for each in inner)
    return {name: _decoded(each) for name, each in inner.items()}

"""Names for methods: they exist in JSON and on the command line only; users pass instances."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rankfold.errors import OptionError, PlanError, RegistryError, near_matches, shown

T = TypeVar("T", bound=type)
_BY_NAME: dict[str, type] = {}
_NAMES: dict[type, str] = {}
ENTRY_POINTS = "rankfold.methods"
LATER = "later"  # key, in the metadata of an option's field, of what the method did before it had the option
PLAIN = "plain"  # key in the metadata of an option that is a dict itself, and no method
UNWRITTEN = "unwritten"  # key in the metadata of an option that is no part of a method's JSON
_AS_NOW = object()


def register(name: str) -> Callable[[T], T]:
    """Class decorator that gives a method the name it bears in JSON and on the command line.

    Args:
        name: Lower-case words joined by hyphens, e.g. ``"whitened-svd"``.

    Raises:
        RegistryError: Another class bears the name, or the class is no frozen dataclass. (A statistic need not be
            frozen: it is a sum that grows, and has no options.)
    """

    def decorate(cls: T) -> T:
        other = _BY_NAME.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegistryError(
                name,
                law="a name belongs to one class",
                got=f"{cls.__qualname__} beside {other.__qualname__}",
                cure="choose another name",
            )
        _check_dataclass(name, cls)
        _BY_NAME[name] = cls
        _NAMES[cls] = name
        return cls

    return decorate


def _check_dataclass(name: str, cls: type) -> None:
    """Refuse a class whose options cannot be read off its fields, or may change after they were written."""
    own = vars(cls).get("__dataclass_params__")  # a subclass inherits the attribute, but its own options are no fields
    if own is not None and own.frozen:
        return
    bases = [vars(base).get("__dataclass_params__") for base in cls.__mro__[1:]]
    if any(base is not None and not base.frozen for base in bases):  # a statistic
        return
    raise RegistryError(
        name,
        law="a frozen dataclass",
        got=f"{cls.__qualname__.rpartition('.')[2]}, which is {'no dataclass' if own is None else 'not frozen'}",
        cure="write @dataclass(frozen=True) between @register and the class",
    )


def added(default: Any, *, before: Any = _AS_NOW) -> Any:
    """The field of an option that a method got after plans that name it were written; see `to_json`.

    Args:
        default: Default of the option.
        before: The option under which the method is what it was before; it is not written, and what is not written is
            read as this. Left out, it is the default.
    """
    return dataclasses.field(default=default, metadata={LATER: default if before is _AS_NOW else before})


def name_of(method: object) -> str:
    """The registered name of a method's class.

    Raises:
        RegistryError: The class was never registered.
    """
    try:
        return _NAMES[type(method)]
    except KeyError:
        raise RegistryError(
            type(method).__qualname__,
            law="a method is registered before it is written to JSON",
            got="an unregistered class",
            cure='decorate it with @rankfold.register("its-name")',
        ) from None


def names(base: type) -> list[str]:
    """All registered names whose class derives from `base`, sorted."""
    _load_entry_points()
    return sorted(name for name, cls in _BY_NAME.items() if issubclass(cls, base))


def lookup(name: str, base: type) -> type:
    """The class registered under `name`, which must derive from `base`.

    Entry points of the group ``rankfold.methods`` are loaded when the name is not known yet.
    """
    if name not in _BY_NAME:
        _load_entry_points()
    cls = _BY_NAME.get(name)
    if cls is None or not issubclass(cls, base):
        raise RegistryError(
            repr(name),
            law=f"the name of a registered {base.__name__}",
            got=repr(name),
            cure=near_matches(name, names(base)),
        )
    return cls


def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def to_json(method: Any) -> dict[str, Any]:
    """A method as ``{"name": …, option: value, …}``; options that are methods nest.

    An option that came later (`added`) is written only where it is not at its default, so that plans from before keep
    their bytes.
    """
    result: dict[str, Any] = {"name": name_of(method)}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if UNWRITTEN in field.metadata:
            continue
        if LATER in field.metadata and value == field.metadata[LATER]:
            continue
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if PLAIN in field.metadata and isinstance(value, Mapping):
            value = {key: list(each) if isinstance(each, tuple) else each for key, each in value.items()}
        result[field.name] = to_json(value) if nested else value
    return result


def from_json(value: Any, base: type, *, place: str) -> Any:
    """The instance that `to_json` wrote.

    Args:
        value: A dict with the key ``"name"`` and one key an option; missing options take their defaults.
        base: Class that the class of the instance must derive from.
        place: Place that is named in the message.

    Raises:
        PlanError: The value is no such dict, names an unknown option, or has an option that the class refuses.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise PlanError(
            place, law='a method is {"name": …, option: value, …}', got=shown(value), cure="see docs/file-format.md"
        )
    cls = lookup(value["name"], base)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    options: dict[str, Any] = {name: each.metadata[LATER] for name, each in fields.items() if LATER in each.metadata}
    for key, option in value.items():
        if key == "name":
            continue
        if key not in fields:
            raise PlanError(
                place,
                law=f"an option of {value['name']}",
                got=shown(key),
                cure=near_matches(key, fields) if fields else "it takes none",
            )
        nested = isinstance(option, dict) and PLAIN not in fields[key].metadata
        options[key] = from_json(option, object, place=f"{place}.{key}") if nested else option
    try:
        return cls(**options)
    except (OptionError, TypeError) as cause:
        got = (
            f"{cause.place} = {cause.got[:80]}, not {cause.law}" if isinstance(cause, OptionError) else str(cause)[:160]
        )
        raise PlanError(place, law="options within their ranges", got=got, cure="correct the option") from cause

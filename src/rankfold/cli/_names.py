"""Words on the command line that stand for Python objects and numbers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rankfold.cli._errors import LoadError, UsageError, first_line
from rankfold.errors import BudgetError, OptionError, RankfoldError, near_matches

if TYPE_CHECKING:
    from rankfold.allocation import Budget

FACTORY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
_CALL = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\)\s*)?", re.DOTALL)
_WORDS = {"true": True, "false": False, "null": None}


def import_factory(spec: str) -> Callable[[], Any]:
    """The function that `package.module:factory` or `path/to/file.py:factory` names.

    Modules of the current directory can be imported, and modules beside the file where one is named.

    Raises:
        UsageError: There is no such module, file or name, or the object cannot be called; near matches are named.
        LoadError: The module fails at import.
    """
    module_name, _, path = spec.rpartition(":")
    _look_in(os.getcwd())
    in_file = FILE.fullmatch(spec) is not None
    if in_file and not Path(module_name).is_file():
        near = near_matches(Path(module_name).name, [file.name for file in Path(module_name).parent.glob("*.py")])
        raise UsageError(spec, law="the name of a file", got=f"no file {module_name!r}", cure=near)
    try:
        found: Any = _module_in(Path(module_name)) if in_file else importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        missing = cause.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise LoadError(
                spec, law=f"{module_name} can be imported", got=first_line(cause), cure="install what it needs"
            ) from cause
        raise UsageError(
            spec, law="the name of a module", got=f"no module {missing!r}", cure=_near_modules(missing)
        ) from cause
    except Exception as cause:
        raise LoadError(
            spec,
            law=f"{module_name} can be imported",
            got=first_line(cause),
            cure="run again with --traceback to see where",
        ) from cause
    for name in path.split("."):
        if not hasattr(found, name):
            names = [each for each in dir(found) if not each.startswith("_") and callable(getattr(found, each, None))]
            raise UsageError(
                spec, law="the name of a function", got=f"no {name!r} there", cure=near_matches(name, names)
            )
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(
            spec, law="the name of a function", got=f"a {type(found).__name__}", cure="name a function that returns it"
        )
    return found  # type: ignore[no-any-return]


def is_factory(text: str) -> bool:
    """Whether a word is written like the name of a factory."""
    return (FILE.fullmatch(text) or FACTORY.fullmatch(text)) is not None


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _module_in(file: Path) -> ModuleType:
    """The module that a file holds, imported once; the name of the module is the file's path, which hides no other."""
    file = file.resolve()
    name = str(file)
    if name in sys.modules:
        return sys.modules[name]
    _look_in(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def call(factory: Callable[[], Any], spec: str) -> Any:
    """Call a factory that was named on the command line.

    Raises:
        UsageError: The factory needs arguments.
        LoadError: The factory fails.
    """
    try:
        inspect.signature(factory).bind()
    except TypeError as cause:
        raise UsageError(
            spec, law="a factory takes no arguments", got=str(cause), cure="write a function that passes them"
        ) from cause
    except ValueError:
        pass  # some built-in callables have no signature to look at
    try:
        return factory()
    except Exception as cause:
        raise LoadError(
            spec, law="the factory runs", got=first_line(cause), cure="run again with --traceback to see where"
        ) from cause


def _near_modules(missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    where = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    return near_matches(last, [module.name for module in pkgutil.iter_modules(where)])


def parse_method(text: str, base: type, *, option: str) -> Any:
    """The method that `name`, `name(option=value, …)` or its JSON stands for.

    Args:
        text: Text as typed. Values are Python literals, `true`, `false`, `null`, or methods again.
        base: Class that the method must derive from.
        option: Name of the option that the text was given to, for the message.

    Raises:
        UsageError: The text has no registered name, an unknown option, or a value that the method refuses.
    """
    import rankfold.allocation
    import rankfold.channels.widths
    import rankfold.decompositions
    import rankfold.outputs.kinds
    import rankfold.repair  # noqa: F401 - all of these fill the registry
    from rankfold.registry import from_json
    from rankfold.serialization import parse_json

    place = f"{option} {text}"
    is_json = text.lstrip().startswith("{")
    if is_json:
        try:
            value = parse_json(text, place=place, error=UsageError)
        except UsageError as cause:
            raise UsageError(
                place, law='JSON like {"name": "svd"}', got=cause.got, cure="mind the quotes of the shell"
            ) from cause
    else:
        value = _method_json(text, place)
    try:
        return from_json(value, base, place=place)
    except RankfoldError as cause:
        raise UsageError.of(place, cause) from cause


def parse_outputs(texts: list[str] | None) -> Any:
    """Kinds of the outputs: one kind, or a dict of kinds from `name=kind` for each output; None if nothing was typed.

    Raises:
        UsageError: A text names no kind, or there are several that do not name their outputs.
    """
    from rankfold.outputs.taken import Output

    option = "--outputs"
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, kind = text.partition("=")
        if not equals or "(" in name or text.lstrip().startswith("{"):
            if len(texts or ()) > 1:
                raise UsageError(
                    f"{option} {text}",
                    law="of several outputs each is named",
                    got="no name",
                    cure=f"for example {option} logits=logits {option} boxes=values",
                )
            return parse_method(text, Output, option=option)
        pairs[name] = kind
    kinds = {
        name: None if text == "none" else parse_method(text, Output, option=option) for name, text in pairs.items()
    }
    return kinds or None


def _method_json(text: str, place: str) -> dict[str, Any]:
    call = _CALL.fullmatch(text)
    if call is None:
        raise UsageError(
            place,
            law="a method is name or name(option=value, …)",
            got=repr(text),
            cure="rankfold compress --list-methods",
        )
    result: dict[str, Any] = {"name": call[1]}
    for part in _split(call[2] or ""):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier() or key.strip() in result:
            raise UsageError(
                place,
                law="options are written option=value, each once",
                got=repr(part.strip()),
                cure="rankfold compress --list-methods",
            )
        result[key.strip()] = _value(value.strip(), place)
    return result


def _value(text: str, place: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _method_json(text, place)


def _split(text: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def parse_bound(text: str | None, *, option: str) -> float | int | None:
    """A bound of a budget: an int above 1 is absolute, anything else a kept fraction.

    Raises:
        UsageError: The text is no number.
    """
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise UsageError(
                f"{option} {text}",
                law="a kept fraction (0.5) or an absolute whole number (100000)",
                got=repr(text),
                cure=f"for half of the original: {option} 0.5",
            ) from None
    return 1.0 if number == 1 else number


def parse_budget(bounds: Mapping[str, str | None]) -> Budget:
    """A budget from its bounds as typed, by resource.

    Raises:
        UsageError: There is no bound, or one that a budget refuses.
    """
    from rankfold.allocation import Budget

    values = {name: parse_bound(text, option=f"--{name}") for name, text in bounds.items()}
    if all(value is None for value in values.values()):
        raise UsageError(
            "compress", law="a budget, or a --plan", got="neither", cure="for half of the parameters: --params 0.5"
        )
    for name, value in values.items():
        if value is None:
            continue
        try:
            Budget(**{name: value})
        except BudgetError as cause:
            raise UsageError.of(
                f"--{name} {bounds[name]}", cause, cure=f"for half of the original: --{name} 0.5"
            ) from cause
    return Budget(**values)


def parse_numbers(text: str, kind: type[int] | type[float], *, option: str) -> tuple[Any, ...]:
    """Numbers between commas; whole numbers may be separated by `x` too.

    Raises:
        UsageError: The text is something else, or has whole numbers below 1.
    """
    parts = re.split("[,x]" if kind is int else ",", text)
    try:
        numbers = tuple(kind(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or (kind is int and min(numbers) < 1):
        example = "3,224,224" if kind is int else "0.5,0.5,0.5"
        raise UsageError(
            f"{option} {text}", law="numbers between commas", got=repr(text), cure=f"for example {option} {example}"
        )
    return numbers


def parse_limit(text: str | None) -> int | None:
    """Bytes of a memory limit; None for no limit.

    Raises:
        UsageError: The text is no size such as 512MB.
    """
    from rankfold.graph.spill import parse_memory

    try:
        return parse_memory(text)
    except OptionError as cause:
        raise UsageError.of(f"--memory {text}", cause, cure="try --memory 512MB") from cause


def parse_positions(text: str) -> int | None:
    """Number of positions of each sample to look at; None for "all".

    Raises:
        UsageError: The text is neither "all" nor a whole number of at least 1.
    """
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"--positions {text}",
            law='a whole number of at least 1, or "all"',
            got=repr(text),
            cure="try --positions 64",
        )
    return int(text)

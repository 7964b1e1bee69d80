"""Bytes on disk: canonical JSON that is safe to read, and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import msgspec

from rankfold.errors import CheckpointError, RankfoldError, WriteError, near_matches, shown

T = TypeVar("T")
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 64
# One half of a surrogate pair, which is no character alone: escaped, or as it is.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
# A key or an index in a path that msgspec writes; "..." is any key of an object.
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")


def canonical_json(value: object) -> str:
    """JSON text that is a function of the value alone: sorted keys, fixed layout, one final newline.

    Args:
        value: Nested dicts, lists, strings, ints, finite floats, booleans and None.

    Returns:
        The text. Equal values give equal bytes, on every machine.

    Raises:
        ValueError: A float is NaN or infinite, which JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str, *, place: str, error: type[RankfoldError] = CheckpointError) -> Any:
    """Parse JSON of untrusted origin: bounded depth, no duplicate keys, no NaN.

    Args:
        text: The JSON text, already bounded in size.
        place: Place that is named in the message.
        error: Class of the error to raise.

    Returns:
        The parsed value.
    """

    def refuse(law: str, got: str) -> NoReturn:
        raise error(place, law=law, got=got, cure="write the file again with rankfold, or restore it from a copy")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            refuse("a JSON object names each key once", f"{next(n for n in names if names.count(n) > 1)!r} twice")
        return result

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse("every number is finite", digits[:20])

    depth = _depth(text)
    if depth > MAX_JSON_DEPTH:
        refuse(f"JSON is nested at most {MAX_JSON_DEPTH} deep", f"depth {depth}")
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda name: refuse("every number is finite", name),
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as cause:
        half = ascii(cause.object[cause.start])
        raise error(
            place,
            law="every string is Unicode text",
            got=f"half a character, {half}",
            cure="write it whole, or leave it out",
        ) from cause
    except RankfoldError:
        raise
    except (ValueError, RecursionError) as cause:  # ValueError: also an int of more digits than Python reads
        raise error(
            place, law="the file holds valid JSON", got=str(cause), cure="restore the file from a copy"
        ) from cause


def converted(
    value: Any,
    kind: type[T],
    *,
    place: str,
    error: type[RankfoldError] = CheckpointError,
    cure: str = "write the file again with rankfold, or restore it from a copy",
) -> T:
    """A dataclass or struct from JSON values, every field of the type that it is annotated with.

    Args:
        value: Value that `parse_json` returned.
        kind: Class of the result; its own options decide whether unknown keys are left out or refused.
        place: Place that is named in the message.
        error: Class of the error to raise.
        cure: Advice for the message.

    Raises:
        RankfoldError: An error of the class `error`, naming the place inside the value, what is expected there, and
            what is found.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as cause:
        text, _, path = str(cause).partition(" - at `$")
        text, path = text.partition(" - at `key`")[0], path.rstrip("`")
        found = _at(value, path)
        if (named := re.fullmatch("Object contains unknown field `(.*)`", text)) is not None:
            law, got, cure = "only known keys", repr(named[1]), near_matches(named[1], _fields_at(kind, path))
        elif (named := re.fullmatch("Object missing required field `(.*)`", text)) is not None:
            law, got, cure = f"the key {named[1]!r}", f"keys {shown(sorted(found))}", "add it"
        else:
            law = text.removeprefix("Expected ").partition(", got")[0].replace("`", "")
            law = "a finite number" if law == "Number out of range" else f"a JSON {law}"
            got = shown(found)
        raise error(f"{place}{path}", law=law, got=got, cure=cure) from cause


def _at(value: Any, path: str) -> Any:
    """Value at a path such as `.decisions[0].site`; where it goes through any key of an object, that object."""
    for key, index in _STEP.findall(path):
        if index == "...":
            return value
        value = value[key] if key else value[int(index)]
    return value


def _fields_at(kind: Any, path: str) -> set[str]:
    """Names of the fields of the class that stands at a path inside a class."""
    for key, _ in _STEP.findall(path):
        inner = [each for each in get_args(kind) if each is not type(None)]
        kind = get_type_hints(kind).get(key) if key else (inner[-1] if inner else None)
    return set(get_type_hints(kind)) if isinstance(kind, type) else set()


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, found without recursion."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_JSON_DEPTH:
                return deepest
        elif character in "]}":
            depth -= 1
    return deepest


def read_json(path: Path, *, error: type[RankfoldError] = CheckpointError) -> Any:
    """Read a JSON file of at most 64 MiB; its size is looked at before a byte is read.

    Args:
        path: The file.
        error: Class of the error to raise.

    Returns:
        The parsed value.
    """
    check_json_size(path, error=error)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as cause:
        raise error(str(path), law="the file exists", got="no such file", cure="check the path") from cause
    except (UnicodeDecodeError, OSError) as cause:
        raise error(
            str(path), law="the file holds UTF-8 text", got=str(cause), cure="restore it from a copy"
        ) from cause
    return parse_json(text, place=str(path), error=error)


def check_json_size(path: Path, *, error: type[RankfoldError] = CheckpointError) -> None:
    """Refuse a file that is too large for a JSON file of ours, without reading it, and one that has no size.

    Args:
        path: The file; one that is not there passes.
        error: Class of the error to raise.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or pipe"
        raise error(str(path), law="the path of a JSON file", got=kind, cure="check the path")
    size = path.stat().st_size if path.exists() else 0
    if size > MAX_JSON_BYTES:
        raise error(
            str(path),
            law=f"a JSON file holds at most {MAX_JSON_BYTES} bytes",
            got=f"{size} bytes",
            cure="this is no file that rankfold wrote; restore it from a copy",
        )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_directory(path: Path, writers: Mapping[str, Callable[[Path], None]], *, overwrite: bool = False) -> None:
    """Write a directory so that it appears whole or not at all.

    The files are written into a hidden sibling, flushed to disk, and the sibling is renamed into place. A process
    killed on the way leaves at most the hidden sibling (`.NAME.…`), never a half-written `path`.

    Args:
        path: The directory to create. It must not exist, or be empty, unless `overwrite`.
        writers: Functions that write the file they are given, by file name.
        overwrite: True if an existing directory is replaced (moved aside first, removed last), provided it holds
            nothing but files of the names in `writers`: nobody's other files are lost.

    Raises:
        WriteError: The directory is taken, or cannot be written (read-only, full disk).
    """
    if "\0" in str(path):
        raise WriteError(ascii(str(path)), law="a path holds no NUL", got="one", cure="choose another name")
    scratch: Path | None = None
    absent: list[Path] = []
    try:
        _check_free(path, set(writers), overwrite=overwrite)
        absent = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        for name, write in writers.items():
            write(scratch / name)
            (scratch / name).chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            flush(scratch / name)
        flush(scratch)
        scratch.chmod(0o777 & ~_umask())
        _swap(scratch, path)
        flush(path.parent)
    except BaseException as cause:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in absent:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(cause, RankfoldError) or not isinstance(cause, OSError):
            raise
        raise WriteError(
            str(path),
            law="the output directory can be written",
            got=str(cause),
            cure="choose a shorter name"
            if cause.errno == errno.ENAMETOOLONG
            else "check the permissions and the free space; nothing was left behind",
        ) from cause


def _check_free(path: Path, names: set[str], *, overwrite: bool) -> None:
    """Refuse a file, and a directory with files in it unless all of them may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise WriteError(str(path), law="the output is a directory", got="a file", cure="choose another path")
    held = sorted(file.name for file in path.iterdir())
    if held and not overwrite:
        raise WriteError(
            str(path),
            law="the output is a new or empty directory",
            got=f"one with files in it, such as {held[0]!r}",
            cure="choose another path, or pass overwrite=True",
        )
    foreign = [name for name in held if name not in names]
    if foreign:
        raise WriteError(
            str(path),
            law=f"overwrite=True replaces nothing but {', '.join(sorted(names))}",
            got=f"a directory that also holds {foreign[0]!r}",
            cure="choose another path, or move that away",
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, in a folder that is made where it is missing.

    A process killed on the way leaves at most a hidden sibling (`.NAME.…`).

    Raises:
        WriteError: The file cannot be written.
    """
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(path)
        flush(path.parent)
    except OSError as cause:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise WriteError(
            str(path),
            law="the file can be written",
            got=str(cause),
            cure="check the permissions and the free space",
        ) from cause


def _swap(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path`, moving what is there aside first and removing it last."""
    if not path.exists():
        scratch.rename(path)
        return
    if path.is_dir() and not any(path.iterdir()):
        scratch.replace(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
    try:
        path.rename(aside)
        scratch.rename(path)
    except BaseException:  # Ctrl-C too: what was there comes back
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """Ask the system to put a file or directory on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(text: str) -> Callable[[Path], None]:
    """A writer of UTF-8 text for `write_directory`."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write

"""Values of `--family`, `--selector`, `--repair` and `--outputs`, as described by the methods' own docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap

WIDTH = 100


def listing() -> str:
    """Every registered family, selector and repair with its options and their defaults."""
    import rankfold.allocation
    import rankfold.channels.widths
    import rankfold.decompositions
    import rankfold.outputs.kinds
    import rankfold.repair
    from rankfold.registry import lookup, names

    axes = (
        ("families, for --family", rankfold.decompositions.Family),
        ("selectors, for --selector", rankfold.allocation.Selector),
        ("repairs, for --repair", rankfold.repair.Lockstep),
        ("kinds of outputs, for --outputs", rankfold.outputs.kinds.Output),
    )
    lines: list[str] = []
    for title, base in axes:
        lines += [title, ""]
        for name in names(base):
            cls = lookup(name, base)
            documentation = inspect.getdoc(cls) or ""
            lines.append(f"  {name}")
            lines += textwrap.wrap(
                _first_paragraph(documentation), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
            meanings = _attributes(documentation)
            for field in dataclasses.fields(cls):
                text = f"{field.name}={_default(field)}: {meanings.get(field.name, '')}"
                lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)
            lines.append("")
    return "\n".join(lines)


def _first_paragraph(documentation: str) -> str:
    return " ".join(documentation.partition("\n\n")[0].split())


def _attributes(documentation: str) -> dict[str, str]:
    """The entries of a Google docstring's "Attributes:" section."""
    _, _, section = documentation.partition("Attributes:\n")
    result: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if not line.startswith("    "):
            break
        if line[4] != " ":
            name, _, text = line.strip().partition(": ")
            result[name] = text
        else:
            result[name] += f" {line.strip()}"
    return result


def _default(field: dataclasses.Field[object]) -> str:
    from rankfold.registry import name_of

    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return name_of(value) if dataclasses.is_dataclass(value) else repr(value)

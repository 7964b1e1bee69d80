"""Groups of layers by their paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from rankfold.errors import OptionError, near_matches

KINDS = ("stage", "projection")
# Last parts of the paths of a transformer's projections, as the model families of today name them.
PROJECTIONS = {
    "query and key": (
        "q_proj",
        "k_proj",
        "query",
        "key",
        "q_lin",
        "k_lin",
        "q",
        "k",
        "query_key_value",
        "c_attn",
        "qkv",
    ),
    "output": ("o_proj", "out_proj", "out_lin", "o", "proj"),
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "fc1", "lin1", "wi", "wi_1", "w3", "c_fc", "intermediate"),
    "down": ("down_proj", "fc2", "lin2", "wo", "w2"),
}
VALUES = ("v_proj", "value", "v_lin", "v")


def check_groups(place: str, groups: Any) -> None:
    """Refuse what is neither a kind of groups nor names of groups by pattern.

    Raises:
        OptionError: It is neither.
    """
    if isinstance(groups, str):
        if groups in KINDS:
            return
        cure = near_matches(groups, KINDS)
    else:
        own = groups.items() if isinstance(groups, Mapping) else ()
        if own and all(isinstance(pattern, str) and isinstance(name, str) for pattern, name in own):
            return
        cure = 'try {"layer1.*": "early", "layer2.*": "late"}'
    law = f"{KINDS[0]!r}, {KINDS[1]!r}, or names of groups by path or pattern"
    raise OptionError(place, law=law, got=repr(groups)[:80], cure=cure)


def grouped(paths: Sequence[str], groups: str | Mapping[str, str], spans: int) -> list[str | None]:
    """Name of the group of each layer; None for one that stays dense.

    Args:
        paths: Paths of the layers, in their order.
        groups: See `check_groups`.
        spans: Number of spans into which every group is cut, in the order of its layers.

    Raises:
        OptionError: A pattern matches no layer.
    """
    if isinstance(groups, Mapping):
        for pattern in groups:
            if not any(fnmatchcase(path, pattern) for path in paths):
                cure = near_matches(pattern, list(paths))
                raise OptionError("groups", law="every pattern matches a layer", got=repr(pattern), cure=cure)
        names = [next((n for pattern, n in groups.items() if fnmatchcase(path, pattern)), None) for path in paths]
    else:
        names = [_stage(path) if groups == "stage" else _projection(path) for path in paths]
    if spans == 1:
        return names
    number = {name: names.count(name) for name in names}
    seen = dict.fromkeys(number, 0)
    result: list[str | None] = []
    for name in names:
        result.append(None if name is None else f"{name} {1 + seen[name] * spans // number[name]}")
        seen[name] += 1
    return result


def _stage(path: str) -> str:
    """What stands before the first number of a path that has one, else its first part."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return parts[0] if not number else ".".join(parts[:number])


def _projection(path: str) -> str | None:
    """The kind of a transformer's projection; None for a value projection, "other" for what is none."""
    parts = path.split(".")
    if parts[-1] in VALUES:
        return None
    for name, known in PROJECTIONS.items():
        if parts[-1] in known:
            return name
    if parts[-1] in ("dense", "c_proj"):  # BERT and GPT-2 name by the module around it
        around = parts[-2] if len(parts) > 1 else ""
        inside = any("attention" in part or part == "attn" for part in parts[:-1])
        return "up" if around == "intermediate" else "output" if inside else "down"
    return "other"

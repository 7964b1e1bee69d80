"""Imports point one way between folders, and importing the package changes nothing for anyone else."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankfold

ROOT = Path(rankfold.__file__).parent
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "_version"}),
    frozenset({"registry", "serialization", "progress"}),
    frozenset({"linalg"}),
    frozenset({"factors", "indices"}),
    frozenset({"decompositions"}),
    frozenset({"layers"}),
    frozenset({"graph", "statistics", "ranks", "metrics"}),
    frozenset(
        {
            "channels",
            "curves",
            "forecast",
            "plan",
            "planning",
            "surgery",
            "repair",
            "applying",
            "attempts",
            "pipeline",
            "checkpoint",
            "hugging_face",
            "prediction",
            "proposals",
            "rates",
            "reach",
            "report",
            "results",
            "session",
            "trials",
            "work",
        }
    ),
    frozenset({"digits", "testing", "integrations", "training"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# What knows nothing of what, whatever the levels would allow.
STRANGERS = {
    "linalg": {"registry", "serialization", "progress"},
    "factors": {"registry", "serialization", "progress"},
    "decompositions": {"serialization", "progress"},
    "layers": {"decompositions", "linalg", "registry", "serialization", "progress"},
    "ranks": {"statistics"},
}

Edge = tuple[str, str, bool]


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of every module but the package's own `__init__`, which re-exports everything."""
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("rankfold", *file.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        if name != "rankfold":
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def imported(name: str, tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every rankfold module that a module imports, anywhere in it, and whether it does so while it is imported."""
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _only_for_types(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            base = node.module or ""
            modules = [f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "rankfold":
                yield module, id(node) not in late


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("rankfold") and (path.with_suffix(".py").exists() or path.is_dir())


def folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


EDGES: list[Edge] = [(name, target, early) for name, tree in sources() for target, early in imported(name, tree)]


def test_every_folder_has_its_place() -> None:
    missing = {folder(name) for name, _ in sources()} - set(LEVEL)
    assert not missing, "name its level in LEVELS"


def test_no_module_imports_from_the_package_itself() -> None:
    assert [(source, target) for source, target, _ in EDGES if target == "rankfold"] == []


def test_imports_point_one_way_between_folders() -> None:
    upwards = [(source, target) for source, target, _ in EDGES if LEVEL[folder(target)] > LEVEL[folder(source)]]
    assert upwards == []
    assert len(EDGES) > 100


def test_methods_know_nothing_of_layers_nor_the_linear_algebra_of_anything() -> None:
    known = [(source, target) for source, target, _ in EDGES if folder(target) in STRANGERS.get(folder(source), set())]
    assert known == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    after: dict[str, set[str]] = {}
    for source, target, early in EDGES:
        if early and source != target:
            after.setdefault(source, set()).add(target)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(after.get(module, ())):
                walk(target, (*path, module))
            done.add(module)

    for module in sorted(after):
        walk(module, ())


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(ROOT)], "rankfold.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


@pytest.mark.parametrize("name", ["rankfold", *(name for name in modules() if not name.startswith("rankfold.cli."))])
def test_what_a_module_exports_is_sorted_and_there(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert list(exported) == sorted(exported, key=lambda word: (_kind(word), word))
    for word in exported:
        assert getattr(module, word) is not None


def _kind(name: str) -> int:
    """Constants, then classes, then functions, as the linter sorts them."""
    return 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2


STATE = """
import logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "backends": (
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled,
        ),
        "cuda": torch.cuda.is_initialized(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "generator": random.getstate(),
        "numpy errors": numpy.geterr(),
        "printing": (numpy.get_printoptions(), str(torch._tensor_str.PRINT_OPTS)),
        "warnings": [str(each) for each in warnings.filters],
        "logging": (logging.root.level, list(logging.root.handlers), logging.lastResort),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
    }

before = state()
import rankfold
for name in rankfold.__all__:
    getattr(rankfold, name)
import rankfold.linalg.svd, rankfold.linalg.tucker
after = state()
changed = {key: (before[key], after[key]) for key in before if str(before[key]) != str(after[key])}
assert not changed, changed
"""


def test_importing_the_package_changes_no_global_state() -> None:
    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, rankfold, rankfold.errors; dir(rankfold); "
        "print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Laws of the package's face."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import rankfold

PACKAGES = {"training"}  # public by their own name


def test_no_public_name_is_also_a_submodule() -> None:
    """Importing `rankfold.x` binds the module as `x` in the package, where it would hide a function of that name.

    A package that is public is one: `rankfold.training`.
    """
    submodules = {module.name for module in pkgutil.iter_modules(rankfold.__path__)}
    public = submodules.intersection(rankfold.__all__)
    assert public == PACKAGES
    assert all(getattr(rankfold, name) is importlib.import_module(f"rankfold.{name}") for name in public)


def _stub() -> dict[str, str]:
    """The public names with their homes, as the stub has them."""
    tree = ast.parse(Path(rankfold.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        assert isinstance(node, ast.ImportFrom), "the stub holds imports alone"
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported"
            assert alias.name not in found, f"{alias.name} stands there twice"
            found[alias.name] = f"rankfold.{node.module}"
    return found


def test_every_public_name_is_the_one_of_its_home() -> None:
    for name, home in _stub().items():
        if name in PACKAGES:
            continue
        assert getattr(rankfold, name) is getattr(importlib.import_module(home), name)


def test_the_stub_is_complete() -> None:
    assert set(rankfold.__all__) == set(_stub())
    assert dir(rankfold) == sorted(rankfold.__all__)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, rankfold; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Laws of the package's face."""

import importlib
import pkgutil
import subprocess
import sys

import rankfold


def test_no_public_name_is_also_a_submodule():
    """Importing `rankfold.x` binds the module as `x` in the package, where it would hide a function of that name."""
    submodules = {module.name for module in pkgutil.iter_modules(rankfold.__path__)}
    assert not submodules.intersection(rankfold.__all__)


def test_every_public_name_is_the_one_of_its_home():
    for name, home in rankfold._WHERE.items():
        assert getattr(rankfold, name) is getattr(importlib.import_module(home), name)


def test_the_list_of_public_names_is_sorted_and_complete():
    assert set(rankfold.__all__) == {*rankfold._WHERE, "__version__"}
    assert rankfold.__all__ == sorted(rankfold.__all__, key=_isort_key)
    assert dir(rankfold) == sorted(rankfold.__all__)


def _isort_key(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


def test_importing_the_package_loads_no_torch():
    code = "import sys, rankfold; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

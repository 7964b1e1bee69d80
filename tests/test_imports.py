"""Importing the package changes nothing for anyone else. That imports point one way is held by import-linter."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rankfold

ROOT = Path(rankfold.__file__).parent


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(ROOT)], "rankfold.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


@pytest.mark.usefixtures("mended_torchvision")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*", "ignore::FutureWarning:lightning.*")
@pytest.mark.parametrize("name", [name for name in modules() if not name.startswith("rankfold.cli.")])
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

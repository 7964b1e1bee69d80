"""Help comes quickly: torch is not imported for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import rankfold

COMMANDS = ("inspect", "compress", "compare", "demo")
SCRIPT = f"""
import sys
from typer.testing import CliRunner
from rankfold.cli._app import app
for command in ([], *([name] for name in {COMMANDS!r})):
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.output, done.output
heavy = [name for name in ("torch", "numpy", "scipy", "safetensors") if name in sys.modules]
assert not heavy, heavy
"""


def test_help_of_every_command_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_rankfold_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "rankfold", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"rankfold {rankfold.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_offers_json_and_traceback(cli: Any, command: str) -> None:
    done = cli(command, "--help")
    assert "--json" in done.out
    assert "--traceback" in done.out


def test_list_methods_says_what_the_docstrings_say(cli: Any) -> None:
    done = cli("compress", "--list-methods")
    assert done.code == 0
    assert "whitened-svd" in done.out
    assert "damping=1e-06: Ridge added to `A`, as a fraction of its mean eigenvalue." in done.out
    assert "selector=lagrangian: The selector that chooses." in done.out


def test_unknown_command_is_bad_usage_with_near_matches(cli: Any) -> None:
    done = cli("compres")
    assert done.code == 2
    assert "compress" in done.err

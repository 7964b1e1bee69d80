"""Words on the command line that stand for objects and numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rankfold import Lagrangian, Rounded, SpatialSVD, Uniform, WhitenedSVD
from rankfold.allocation import RankSelector
from rankfold.cli._errors import LoadError, UsageError
from rankfold.cli._models import ModelSpec
from rankfold.cli._names import import_factory, parse_bound, parse_method, parse_numbers, parse_positions
from rankfold.decompositions import Decomposition


@pytest.mark.parametrize(
    ("text", "bound"),
    [("0.5", 0.5), (".25", 0.25), ("5e-1", 0.5), ("1", 1.0), ("1.0", 1.0), ("2", 2), ("500000", 500000), (None, None)],
)
def test_a_plain_int_above_one_is_absolute_and_the_rest_a_fraction(text: str | None, bound: float | None) -> None:
    parsed = parse_bound(text, option="--params")
    assert parsed == bound
    assert type(parsed) is type(bound)


def test_a_bound_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="--macs half"):
        parse_bound("half", option="--macs")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("whitened-svd", WhitenedSVD()),
        ("whitened-svd()", WhitenedSVD()),
        ("whitened-svd(damping=1e-4, mirrored=true)", WhitenedSVD(damping=1e-4, mirrored=True)),
        ("whitened-svd(mirrored=True)", WhitenedSVD(mirrored=True)),
        ('{"name": "spatial-svd", "whitened": false}', SpatialSVD(whitened=False)),
    ],
)
def test_a_family_is_a_name_a_call_or_json(text: str, method: Decomposition) -> None:
    assert parse_method(text, Decomposition, option="--family") == method


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("rounded", Rounded()),
        ("rounded(multiple=4)", Rounded(Lagrangian(), 4)),
        ("rounded(selector=uniform, multiple=16)", Rounded(Uniform(), 16)),
        ("rounded(selector=rounded(selector=uniform,multiple=2),multiple=4)", Rounded(Rounded(Uniform(), 2), 4)),
    ],
)
def test_methods_nest_in_options(text: str, method: RankSelector) -> None:
    assert parse_method(text, RankSelector, option="--selector") == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whitenedsvd", "did you mean 'whitened-svd'"),
        ("whitened-svd(dampin=1)", "did you mean 'damping'"),
        ("whitened-svd(damping=7)", "0 to 1"),
        ("whitened-svd(damping", "name or name"),
        ("whitened-svd(1e-4)", "option=value"),
        ("whitened-svd(damping=1e-4, damping=1e-5)", "each once"),
        ("uniform", "the name of a registered Decomposition"),
        ('{"name"', "JSON like"),
        ('{"nom": "svd"}', "name"),
    ],
)
def test_a_method_that_means_nothing_is_bad_usage(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_method(text, Decomposition, option="--family")
    assert str(caught.value).startswith(f"--family {text}")


def test_numbers_are_parted_by_commas() -> None:
    assert parse_numbers("3,8,8", int, option="--shape") == (3, 8, 8)
    assert parse_numbers("3x8x8", int, option="--shape") == (3, 8, 8)
    assert parse_numbers("0.5,1", float, option="--mean") == (0.5, 1.0)


@pytest.mark.parametrize("text", ["", "3,,8", "3,0,8", "a"])
def test_a_shape_of_other_things_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="numbers between commas"):
        parse_numbers(text, int, option="--shape")


def test_positions_are_a_number_or_all() -> None:
    assert parse_positions("all") is None
    assert parse_positions("32") == 32
    for text in ("0", "-1", "many"):
        with pytest.raises(UsageError, match="at least 1"):
            parse_positions(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cli_network:tiny", "did you mean 'cli_networks'"),
        ("cli_networks:tny", "did you mean 'tiny'"),
        ("cli_networks.deeper:tiny", "no module 'cli_networks.deeper'"),
        ("cli_networks:nn.Liner", "'Linear'"),
        ("cli_networks:__doc__", "a str"),
    ],
)
def test_a_factory_that_is_not_there_is_bad_usage(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        import_factory(spec)


def test_the_current_directory_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_in_this_folder.py").write_text("def make():\n    return 11\n")
    monkeypatch.syspath_prepend(tmp_path.parent)  # so that the path is as before afterwards
    monkeypatch.chdir(tmp_path)
    assert import_factory("only_in_this_folder:make")() == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [("import nothing_by_this_name", "nothing_by_this_name"), ("raise OSError('no disk')", "OSError: no disk")],
)
def test_a_module_that_fails_at_import_is_a_failure(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_at_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError, match=message):
        import_factory("failing_at_import:make")


def test_a_selector_of_widths_is_known_to_a_process_that_did_nothing_else() -> None:
    code = (
        "from rankfold.cli._names import parse_method; from rankfold.allocation import Selector;"
        "parse_method('same-share', Selector, option='--selector')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


FILE = """
from dataclasses import dataclass
import torch
from beside_it import WIDTH

CALLS = []

@dataclass
class Wide:
    width: int = WIDTH

def model():
    CALLS.append(1)
    return torch.nn.Linear(WIDTH, 3)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "beside_it.py").write_text("WIDTH = 5")
    (tmp_path / "nets" / "torch.py").write_text(FILE)  # the name of a file hides no module
    return tmp_path / "nets" / "torch.py"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_factory_in_a_file_is_found_once_with_what_lies_beside_it(absolute: bool, file: Path) -> None:
    spec = f"{file if absolute else file.relative_to(Path.cwd())}:model"
    assert ModelSpec.parse(spec).kind == "factory"
    factory = import_factory(spec)
    assert factory().weight.shape == (3, 5)
    assert import_factory(f"{file}:model") is factory


def test_a_file_that_is_not_there_names_those_that_are(file: Path) -> None:
    with pytest.raises(UsageError, match=r"the name of a file · got no file 'nets/torhc.py' · did you mean 'torch.py'"):
        import_factory("nets/torhc.py:model")
    with pytest.raises(UsageError, match="no 'modle' there · did you mean 'model'"):
        import_factory("nets/torch.py:modle")


def test_a_file_that_fails_is_named_and_tried_anew(file: Path) -> None:
    file.write_text("import not_there_at_all")
    for _ in range(2):
        with pytest.raises(LoadError, match=r"torch\.py can be imported · got ModuleNotFoundError"):
            import_factory(f"{file}:model")

"""The written side is held to the code: examples run, pages name what there is, commands exist."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold as rf
from rankfold import registry
from rankfold.cli._app import app
from rankfold.digits import make_model
from rankfold.testing import DecompositionConformance

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITTEN = {**PAGES, "README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}


def ours(base: type) -> Any:
    """Registered names of the classes that the package brings."""
    return [name for name in registry.names(base) if registry.lookup(name, base).__module__.startswith("rankfold.")]


def started(example: Path) -> list[str]:
    """Arguments that run an example; torch's exporter imports torchvision, which is mended where it does not fit."""
    if "onnx" not in example.read_text(encoding="utf-8"):
        return [str(example)]
    mended = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.zoo import import_torchvision as mend; mend()"
    )
    return ["-c", f"{mended}; import runpy; runpy.run_path({str(example)!r}, run_name='__main__')"]


def run(*arguments: str, cwd: Path) -> Any:
    """Run the interpreter in a process of its own, as a user does, with warnings as errors."""
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


ScaledSVD = runpy.run_path(str(ROOT / "examples" / "own_method.py"), run_name="examples.own_method")["ScaledSVD"]
del registry._BY_NAME["scaled-svd"]  # the other tests see our own methods only


@pytest.mark.slow
class TestTheExampleMethodKeepsTheLaws(DecompositionConformance):
    """The method of `own_method.py`, on a few of the shapes and layers."""

    method = ScaledSVD()
    shapes = ((12, 20), (20, 12), (8, 6, 3, 3))
    layers = ("linear", "conv2d")

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(registry._BY_NAME, "scaled-svd", ScaledSVD)

    def metric(self, moments: Any, features: Any) -> Any:
        """Its errors are measured in its own metric."""
        return torch.diag(self.method.scale(moments).square())


def body(example: Path) -> Any:
    """An example without its docstring."""
    return (ROOT / "examples" / example).read_text(encoding="utf-8").split('"""\n\n', 1)[1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    done = run(*started(example), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "same decision on" in done.stdout


@pytest.mark.slow
def test_the_edited_plan_is_what_was_carried_out(tmp_path: Path) -> None:
    done = run(str(ROOT / "examples" / "edit_a_plan.py"), cwd=tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    reasons = {decision["site"]: decision["why"] for decision in plan["decisions"]}
    assert reasons["blocks.0.conv1"] == "left dense by hand"
    planned, edited = re.findall(r"([\d,]+) params", done.stdout)
    assert planned != edited


@pytest.mark.slow
def test_the_commands_of_the_readme_run_and_their_checkpoint_loads(tmp_path: Path) -> None:
    commands = re.findall(r"^rankfold (\w+ rankfold\.digits:.*)$", README, re.M)
    assert [command.split()[0] for command in commands] == ["inspect", "compress", "compare"]
    for command in commands:
        done = run("-m", "rankfold", *command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert rf.load(tmp_path / "small-cli", factory=make_model).training is False


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints(tmp_path: Path) -> None:
    done = run("-m", "rankfold", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    percent = re.compile(r"^  (?:read rightly|same decision) .*$", re.M)
    shown, printed = (percent.findall(text) for text in (README, done.stdout))
    assert len(shown) == len(printed) == 2
    for before, now in zip(shown, printed, strict=True):
        numbers = [[float(number) for number in re.findall(r"([\d.]+)%", line)] for line in (before, now)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1.0)  # points; another machine may round ranks differently
    costs = re.compile(r"^(?:params|macs|bytes) .*?([\d,]+) →", re.M)
    assert costs.findall(README) == costs.findall(done.stdout)


def test_the_readme_shows_the_first_program_as_it_is() -> None:
    assert f"```python\n{body('first_program.py')}\n```" in README


def test_every_example_is_included_in_the_docs() -> None:
    page = PAGES["docs/examples.md"]
    assert set(re.findall(r'--8<-- "(.*?)"', page)) == {path.relative_to(ROOT).as_posix() for path in EXAMPLES}


@pytest.mark.parametrize("name", ours(rf.Decomposition))
def test_every_decomposition_of_ours_has_a_page(name: str) -> None:
    assert f"`{name}`" in PAGES[f"docs/methods/{name}.md"]


@pytest.mark.parametrize("name", ours(rf.RankSelector))
def test_every_selector_of_ours_is_on_the_page_of_selectors(name: str) -> None:
    assert f"`{name}`" in PAGES["docs/methods/rank-selectors.md"]


def test_every_public_name_is_in_the_reference() -> None:
    shown = {name for page in PAGES.values() for name in re.findall(r"^::: rankfold\.(\w+)$", page, re.M)}
    assert set(rf.__all__) - {"__version__", "RankfoldError"} <= shown
    assert "::: rankfold.errors" in PAGES["docs/api.md"]  # RankfoldError and all that derive from it


def test_the_file_format_names_every_key_of_a_plan() -> None:
    decision = rf.Decision("layer", rf.WhitenedSVD(), 3, "because")
    plan = rf.Plan((decision,), (rf.Skip("other", "tied"),), "fingerprint")
    page = PAGES["docs/file-format.md"]
    written = json.loads(plan.to_json())
    for key in {*written, *written["decisions"][0], *written["skips"][0]}:
        assert f"`{key}`" in page or f'"{key}"' in page, key


def test_the_plan_shown_in_the_file_format_can_be_read() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", PAGES["docs/file-format.md"], re.S)
    plan = rf.Plan.from_json(shown)
    assert plan.at("blocks.0.conv1").method == rf.WhitenedSVD()
    assert plan.at("head").method is None


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_every_command_that_is_written_about_exists(page: Any) -> None:
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    text = "\n".join(
        re.findall(r"`rankfold ([a-z]+)", WRITTEN[page]) + re.findall(r"^rankfold ([a-z]+)", WRITTEN[page], re.M)
    )
    assert set(text.split()) <= known


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_every_link_to_a_file_leads_somewhere(page: Any) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", WRITTEN[page]):
        assert ((ROOT / page).parent / target).exists(), target

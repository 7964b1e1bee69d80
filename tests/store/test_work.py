"""Laws of the work directory: what is finished is kept, what is of something else is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.kept_work import Net, bits, files
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import WorkDirError

SELECTOR = rf.Uniform()  # one candidate
KILLED = """
import os, signal, sys
from contextlib import contextmanager
sys.path.insert(0, {tests!r})
import test_work as t

@contextmanager
def progress(stage, steps):
    seen = 0
    def advance():
        nonlocal seen
        seen += 1
        if (stage, seen) == ({stage!r}, {step}):
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

t.compressed({work!r}, progress=progress)
"""


def images(seed: int = 1) -> list[Tensor]:
    return list(torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).split(20))


def compressed(work: str | Path | None, model: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    options = {"budget": rf.Budget(params=0.7), "selector": SELECTOR, **options}
    return rf.compress(model or Net(), images() if data is None else data, work_dir=work, **options)


class Counted:
    """A progress that counts the steps of every stage."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    @contextmanager
    def __call__(self, stage: str, steps: int | None) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            self.steps[stage] = self.steps.get(stage, 0) + 1

        yield advance


@pytest.fixture(scope="module")
def whole() -> Any:
    return compressed(None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished work folder, not to be written into."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    compressed(folder)
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished work folder."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "work"))


@pytest.mark.parametrize(("stage", "step", "left"), [("gradients", 1, 0), ("lockstep", 2, 2)])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    stage: str, step: int, left: int, whole: Any, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    script = KILLED.format(tests=str(Path(__file__).parent), work=str(work), stage=stage, step=step)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = files(work)
    assert "statistics/statistics.json" in before
    assert sum(name.endswith("safetensors") and "plans" in name for name in before) == left
    progress = Counted()
    out = compressed(work, progress=progress)
    assert bits(out) == bits(whole)
    assert out.plan == whole.plan
    assert "statistics" not in progress.steps
    after = files(work)
    kept = [name for name in before if "safetensors" in name]
    assert all(after[name] == before[name] for name in kept)


def test_a_finished_work_gives_the_same_bits_and_solves_nothing(work: Path, whole: Any) -> None:
    before, progress = files(work), Counted()
    out = compressed(work, progress=progress)
    assert bits(out) == bits(whole)
    assert not {"statistics", "gradients", "curves"} & set(progress.steps)
    after = files(work)
    assert set(after) == set(before)
    assert all(after[name] == before[name] for name in before if name.endswith("safetensors"))


@pytest.mark.parametrize(
    "options",
    [{"budget": rf.Budget(params=0.5)}, {"selector": rf.Lagrangian()}, {"repair": rf.Lockstep(ridge=0.01)}],
)
def test_another_budget_selector_or_repair_takes_over_what_does_not_depend_on_it(
    options: dict[str, Any], work: Path
) -> None:
    progress = Counted()
    out = compressed(work, progress=progress, **options)
    assert not {"statistics", "gradients", "curves"} & set(progress.steps)
    assert bits(out) == bits(compressed(None, **options))


def _other_weights() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    return model


def _other_running_mean() -> nn.Module:
    model = Net()
    model.norm.get_buffer("running_mean")[0] = 1.0
    return model


def _other_structure() -> nn.Module:
    model = Net()
    model.head = nn.Linear(12, 7)
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": _other_weights}, "got weights: SHA-256 [0-9a-f]{12} where the work is of [0-9a-f]{12}"),
        ({"model": _other_running_mean}, "got weights: SHA-256"),
        ({"model": _other_structure}, "got structure: SHA-256"),
        ({"data": lambda: images(2)}, "got data: SHA-256"),
        ({"data": lambda: images()[:1]}, "data: SHA-256.*batches: 1 where the work is of 2"),
        ({"seed": lambda: 3}, "got seed: 3 where the work is of 0"),
        ({"positions": lambda: 7}, "got positions: 7 where the work is of 64"),
        ({"weighting": lambda: False}, "got weighting: false where the work is of true"),
        ({"exclude": lambda: ["head"]}, "got sites: without 'head'"),
        ({"families": lambda: [rf.SVD()]}, 'got families: .*"svd".* where the work is of .*"whitened-svd"'),
    ],
)
def test_work_of_something_else_is_refused_with_what_differs(
    change: dict[str, Callable[[], Any]], named: str, finished: Path
) -> None:
    before = files(finished)
    with pytest.raises(WorkDirError, match=named) as caught:
        compressed(finished, **{name: make() for name, make in change.items()})
    assert "pass another work_dir" in caught.value.cure
    assert files(finished) == before


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(WorkDirError, match=r"'letters\.txt' in it"):
        compressed(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letters.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(WorkDirError, match="a directory"):
        compressed(tmp_path / "work")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_head_is_refused(text: str, work: Path) -> None:
    (work / "work.json").write_text(text)
    with pytest.raises(WorkDirError, match=r"work\.json"):
        compressed(work)


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize(
    "pattern",
    [
        "statistics/*.safetensors",
        "gradients/*.safetensors",
        "curves.json",
        "plans/*/*.safetensors",
        "plans/*/plan.json",
        "results/*.json",
    ],
)
def test_a_damaged_file_is_never_used(damage: Callable[[Path], None], pattern: str, work: Path, whole: Any) -> None:
    found = sorted(work.glob(pattern))
    assert found
    for file in found:
        damage(file)
    assert bits(compressed(work)) == bits(whole)


def test_what_a_killed_run_was_writing_is_swept_away(work: Path) -> None:
    (work / ".statistics.abc").mkdir()
    (work / ".curves.json.abc").write_text("half")
    (work / "results" / ".half.json.abc").write_text("half")
    plan = next((work / "plans").iterdir())
    (plan / ".half.safetensors.abc").write_text("half")
    compressed(work)
    assert not [file for file in work.rglob("*") if file.name.startswith(".")]


def test_a_swapped_site_file_is_not_taken_for_another_site(work: Path, whole: Any) -> None:
    first, second, *_ = sorted(work.glob("plans/*/*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert bits(compressed(work)) == bits(whole)


def test_a_model_that_cannot_be_differentiated_is_remembered(tmp_path: Path) -> None:
    class Rounded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    def notes() -> tuple[str, ...]:
        return tuple(compressed(tmp_path / "work", Rounded()).report.notes)

    first = notes()
    assert any("cannot be differentiated" in note for note in first)
    assert notes() == first


@pytest.mark.parametrize("families", [[rf.Interpolative()], None], ids=["channels alone", "default"])
def test_solved_sites_of_a_narrowed_model_are_kept(families: Any, tmp_path: Path) -> None:
    options = {"families": families, "selector": None, "budget": rf.Budget(params=0.6)}
    work = tmp_path / "work"
    alone = compressed(None, **options)
    first = compressed(work, **options)
    kept = files(work)
    progress = Counted()
    again = compressed(work, progress=progress, **options)
    assert bits(first) == bits(alone) == bits(again)
    assert first.plan == again.plan
    narrowed = [name for name in kept if name.endswith("plan.json") and '"cuts"' in (work / name).read_text()]
    assert narrowed
    assert all(
        sum(other.startswith(str(Path(name).parent)) and other.endswith("safetensors") for other in kept) == 3
        for name in narrowed
    )
    after = files(work)
    assert all(after[name] == kept[name] for name in kept if name.endswith("safetensors"))  # nothing is solved again
    assert len(after) == len(kept)

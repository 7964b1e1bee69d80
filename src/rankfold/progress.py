"""Progress of long work: a function that opens a stage and returns a step to call. The default shows nothing."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rankfold.errors import OptionError, shown

Progress: TypeAlias = Callable[[str, "int | None"], AbstractContextManager[Callable[[], None]]]
Told: TypeAlias = Callable[[str, int, "int | None"], object]

# Approximate shares of a whole compression's time, in order. The time left of a run is read off them, at the run's own
# pace; a stage that is passed over drops out.
SHARES: Mapping[str, float] = {
    "load": 0.03,
    "trace": 0.05,
    "statistics": 0.12,
    "gradients": 0.05,
    "curves": 0.15,
    "trials": 0.25,
    "candidates": 0.32,
    "latency": 0.03,
}
LAW = "a function of a stage, the steps done and their number (or None)"
CURE = "pass rankfold.progress_bar() as a context, a function f(stage, done, total), or leave it out"


def _nothing() -> None:
    """One step of a stage nobody watches."""


def silent(stage: str, steps: int | None) -> AbstractContextManager[Callable[[], None]]:
    """The default: nothing is shown.

    Args:
        stage: Name of the stage.
        steps: Number of its steps, or None where that is not known.
    """
    return nullcontext(_nothing)


def as_progress(progress: Progress | Told) -> Progress:
    """The argument `progress` of a function of the library, as a `Progress`.

    Args:
        progress: Function of a stage's name and its number of steps that returns a context with a step to call; or a
            plain function `f(stage, done, total)`, which is called once as a stage begins and after each step.

    Raises:
        OptionError: `progress` is no function, or takes other arguments; or, when the first stage begins, it returns no
            context.
    """
    if not callable(progress):
        raise OptionError("progress", law=LAW, got=shown(progress), cure=CURE)
    if progress is silent:
        return silent
    given: Any = progress
    if _takes(given, 2):

        def opened(stage: str, steps: int | None) -> AbstractContextManager[Callable[[], None]]:
            context = given(stage, steps)
            if not isinstance(context, AbstractContextManager):
                raise OptionError(
                    "progress",
                    law="a function of a stage and its number of steps returns a context",
                    got=shown(context),
                    cure=CURE,
                )
            return context

        return opened
    if not _takes(given, 3):
        raise OptionError("progress", law=LAW, got=shown(progress), cure=CURE)

    @contextmanager
    def told(stage: str, steps: int | None) -> Iterator[Callable[[], None]]:
        done = 0
        given(stage, done, steps)

        def step() -> None:
            nonlocal done
            done += 1
            given(stage, done, steps)

        yield step

    return told


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # some built-in callables have no signature to look at
        return count == 2
    return True


@dataclass(eq=False)
class _Stage:
    """A stage that is open: of `steps` steps (None: unknown) so many are done."""

    name: str
    steps: int | None
    start: float
    done: int = 0


@dataclass(eq=False)
class WholeRun:
    """Progress of a whole run, and about how many seconds are left of it, from the steps of its stages.

    Attributes:
        clock: Function that returns seconds, which only grow.
    """

    clock: Callable[[], float] = time.monotonic
    _open: list[_Stage] = field(default_factory=list)  # the outermost first
    _passed: set[str] = field(default_factory=set)
    _ended: dict[str, float] = field(default_factory=dict)  # seconds by stage

    def begin(self, stage: str, steps: int | None) -> None:
        """A stage begins, maybe inside another."""
        if stage == "lockstep" and not self._open:  # a given plan is carried out: it is the only candidate
            stage = "candidates"
        self._open.append(_Stage(stage, steps, self.clock()))
        if stage in SHARES:
            names = list(SHARES)
            self._passed |= set(names[: names.index(stage)]) - set(self._ended)

    def step(self) -> None:
        """The innermost stage has done one of its steps."""
        self._open[-1].done += 1

    def end(self) -> None:
        """The innermost stage ends."""
        stage = self._open.pop()
        if stage.name in SHARES:
            self._ended[stage.name] = self._ended.get(stage.name, 0.0) + self.clock() - stage.start

    def fraction(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        done, coming = self._shares()
        return done / (done + coming) if done + coming > 0 else 0.0

    def left(self) -> float | None:
        """About how many seconds are left, at the pace so far; None before anything is done."""
        done, coming = self._shares()
        spent = sum(self._ended.values()) + sum(self.clock() - stage.start for stage in self._open[:1])
        return spent * coming / done if done > 0 and spent > 0 else None

    def _shares(self) -> tuple[float, float]:
        total = sum(share for name, share in SHARES.items() if name not in self._passed)
        done = sum(SHARES[name] for name in self._ended)
        if self._open and (name := self._open[0].name) in SHARES and name not in self._ended:
            inside, step = 0.0, 1.0
            for stage in self._open:  # a stage inside another is the outer one's next step
                step = step / stage.steps if stage.steps else 0.0
                inside += step * min(stage.done, stage.steps or 0)
            done += SHARES[name] * min(inside, 1.0)
        return done, max(total - done, 0.0)


@contextmanager
def progress_bar(*, wanted: bool = True) -> Iterator[Progress]:
    """Bars on stderr, with the time left of each stage and of the whole run; nothing where that is no terminal.

    ```python
    with rf.progress_bar() as progress:
        out = rf.compress(model, data, budget=rf.Budget(params=0.5), progress=progress)
    ```

    The time left of the run is approximate: measured on what is done, and shared out over what is to come as in a
    usual run.
    Whatever ends the context, Ctrl-C too, the bars are taken away and the cursor is shown again.

    Args:
        wanted: Switch of the bars; False shows nothing.

    Yields:
        The function to pass as `progress`.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not wanted or not sys.stderr.isatty() or console.is_dumb_terminal:
        yield silent
        return
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Done(MofNCompleteColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.percentage:.0f} %") if "run" in task.fields else super().render(task)

    class TimeLeft(TimeRemainingColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            if "run" not in task.fields:
                return super().render(task)
            left = task.fields["run"].left()
            return Text("-:--:--" if left is None else _clock(left), style="progress.remaining")

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Done(),
        TextColumn("time left"),
        TimeLeft(),
    )
    with Bars(*columns, console=console, transient=True, redirect_stdout=False) as bars:
        run = WholeRun()
        whole = bars.add_task("whole run", total=1.0, run=run, visible=False)

        @contextmanager
        def stage(name: str, steps: int | None) -> Iterator[Callable[[], None]]:
            task = bars.add_task(name, total=steps)
            run.begin(name, steps)
            # A run of all stages begins with "trace"; a function called alone has one stage, which is the whole.
            bars.update(whole, completed=run.fraction(), visible=name == "trace" or bars.tasks[0].visible)

            def step() -> None:
                bars.advance(task)
                run.step()
                bars.update(whole, completed=run.fraction())

            try:
                yield step
            finally:
                run.end()
                bars.update(whole, completed=run.fraction())
                bars.remove_task(task)

        yield stage


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

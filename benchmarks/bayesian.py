"""Bayesian allocation against the default: 30 trials of kept ratios of groups, by two processes of which one is killed.

    python -m benchmarks.bayesian resnet56|minilm [--trials 30] [--folder bayesian-study]

Two workers share one SQLite study; the first is killed after a third of the trials and begun again. When the study is
complete, its plan, that of `Lagrangian` on the same families, and what `compress` chooses by itself are carried out and
judged on the test set: ResNet-56 at half of its parameters by stage, MiniLM at 0.7 of its encoder's by projection.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import optuna
import torch

import rankfold as rf
from benchmarks.families import Task, images, sentences

GROUPS = {"resnet56": "stage", "minilm": "projection"}


def task_of(name: str) -> Task:
    """The network with its data, budget and judge."""
    return sentences() if name == "minilm" else images(name)


def selector_of(name: str, trials: int, folder: Path) -> rf.Bayesian:
    """The study's selector."""
    url = f"sqlite:///{folder.resolve()}/{name}.db"
    return rf.Bayesian(groups=GROUPS[name], n_trials=trials, storage=url)


def complete(selector: rf.Bayesian) -> list[optuna.trial.FrozenTrial]:
    """Trials that were told, in their order; none where the study was not begun."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=selector.study, storage=selector.storage)
        return study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    except KeyError:
        return []


def work(name: str, trials: int, folder: Path, number: int) -> None:
    """Carry trials out until the study has all of them."""
    torch.set_num_threads(1)
    task = task_of(name)
    selector = selector_of(name, trials, folder)
    cache = folder / f"{name}-{number}"
    rf.compress(task.model, task.data, budget=task.budget, selector=selector, exclude=task.spared, work_dir=cache)


def worker(name: str, trials: int, folder: Path, number: int) -> subprocess.Popen[bytes]:
    """A process of its own that does so."""
    own = [name, "--trials", str(trials), "--folder", str(folder), "--worker", str(number)]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.bayesian", *own])


def searched(name: str, trials: int, folder: Path) -> None:
    """Fill the study by two workers, the first of which is killed and begun again."""
    selector = selector_of(name, trials, folder)
    start = time.perf_counter()
    workers = [worker(name, trials, folder, number) for number in (1, 2)]
    killed = False
    while any(each.poll() is None for each in workers):
        time.sleep(5)
        if not killed and len(complete(selector)) >= trials // 3:
            workers[0].kill()
            workers[0].wait()
            print(f"killed the first worker after {len(complete(selector))} trials", flush=True)
            workers[0], killed = worker(name, trials, folder, 1), True
    if any(each.returncode for each in workers):
        raise SystemExit(f"a worker failed: {[each.returncode for each in workers]}")
    values = [trial.value or 0.0 for trial in complete(selector)]
    best = [min(values[: i + 1]) for i in range(len(values))]
    print(f"{len(values)} trials, {time.perf_counter() - start:.0f} s; best so far:", flush=True)
    print("  ".join(f"{i + 1}: {best[i]:.5f}" for i in range(0, len(best), max(1, len(best) // 10))), flush=True)
    kept = min(complete(selector), key=lambda trial: trial.value or 0.0).params
    print("ratios: " + ", ".join(f"{group} {ratio:.2f}" for group, ratio in sorted(kept.items())), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GROUPS)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("bayesian-study"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.name, options.trials, options.folder, options.worker)
        return
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    searched(options.name, options.trials, options.folder)
    task = task_of(options.name)
    ways = {
        "Bayesian": selector_of(options.name, options.trials, options.folder),
        "Lagrangian": rf.Lagrangian(),
        "default": None,
    }
    for label, selector in ways.items():
        cache = options.folder / f"{options.name}-1"
        out = rf.compress(
            task.model, task.data, budget=task.budget, selector=selector, exclude=task.spared, work_dir=cache
        )
        found = "  ".join(f"{key} {value:.4f}" for key, value in task.judge(out.model).items())
        print(f"{options.name}  {label}: {found}", flush=True)


if __name__ == "__main__":
    main()

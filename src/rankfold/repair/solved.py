"""Solved sites of one plan on disk, one file a site."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rankfold.layers import adapter_for, build_shell
from rankfold.plan import Plan
from rankfold.repair.site import Solved
from rankfold.serialization import write_file

LAYER, BUFFER = "layer.", "buffer."


class SolvedSites:
    """Takes a site's solution from its file, or solves the site and writes the file.

    A file holds the tensors of the new layer and the changed buffers, and in its metadata a SHA-256 over all of it. A
    site whose file is missing, cut off or altered is solved again, and the file is written again.

    Args:
        folder: Folder of one plan.
        modules: The original's modules by path.
        plan: Plan with the decision of each site.
    """

    def __init__(self, folder: Path, modules: dict[str, nn.Module], plan: Plan) -> None:
        self._folder, self._modules, self._plan = folder, modules, plan
        for scratch in folder.glob(".*"):  # files that a killed run was writing
            scratch.unlink()

    def __call__(self, path: str, solve: Callable[[], Solved]) -> Solved:
        """The solution of a site.

        Args:
            path: Path of the site.
            solve: Function that solves the site.
        """
        file = self._folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.safetensors"
        kept = self._read(file, path)
        if kept is not None:
            return kept
        solved = solve()
        self._write(file, path, solved)
        return solved

    def _write(self, file: Path, path: str, solved: Solved) -> None:
        changed = solved.layer is not self._modules[path]
        tensors = {LAYER + name: value for name, value in solved.layer.state_dict().items()} if changed else {}
        tensors |= {BUFFER + name: value for name, value in solved.buffers.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        head = json.dumps(
            {
                "site": path,
                "changed": changed,
                "errors": None if solved.errors is None else [error.hex() for error in solved.errors],
                "repaired": solved.repaired,
            }
        )
        write_file(file, save(tensors, {"head": head, "sha256": _sha256(tensors, head)}))

    def _read(self, file: Path, path: str) -> Solved | None:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError):
            return None
        if "head" not in metadata or metadata.get("sha256") != _sha256(tensors, metadata["head"]):
            return None
        head = json.loads(metadata["head"])
        if head["site"] != path:
            return None
        device = next(iter(self._modules[path].parameters())).device
        layer = self._modules[path]
        if head["changed"]:
            layer = self._empty(path)
            layer.load_state_dict(_under(LAYER, tensors))
        buffers = {name: value.to(device) for name, value in _under(BUFFER, tensors).items()}
        errors = head["errors"]
        pair = None if errors is None else (float.fromhex(errors[0]), float.fromhex(errors[1]))
        return Solved(layer, buffers, pair, repaired=head["repaired"])

    def _empty(self, path: str) -> nn.Module:
        """A layer of the structure that the plan gives the site."""
        layer, decision = self._modules[path], self._plan.at(path)
        adapter = adapter_for(layer)
        if adapter is None:
            raise TypeError(f"{path} has no adapter")
        if decision.method is None or decision.rank is None:
            return copy.deepcopy(layer)
        weight = adapter.canonical(layer)
        return build_shell(
            adapter.geometry(layer), decision.method.form, decision.rank, device=weight.device, dtype=weight.dtype
        )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _sha256(tensors: dict[str, Tensor], head: str) -> str:
    sha = hashlib.sha256(head.encode())
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

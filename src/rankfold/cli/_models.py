"""Models by name: a factory, a Hugging Face directory, timm, torchvision, a rankfold checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankfold.cli._errors import LoadError, UsageError
from rankfold.cli._libraries import load_huggingface, make_timm, make_torchvision
from rankfold.cli._names import call, import_factory, is_factory

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["factory", "timm", "torchvision", "huggingface", "checkpoint"]
CURE = "name package.module:factory, path/to/file.py:factory, timm:NAME, torchvision:NAME, or the directory of a model"


@dataclass(frozen=True)
class ModelSpec:
    """A model as it was named, checked as far as that goes without importing anything.

    Attributes:
        text: Name as typed.
        kind: Kind of the model, by which it is made.
        weights: A safetensors file to load into it, or None.
        skeleton: Model that builds the original architecture of a checkpoint; None for other kinds.
    """

    text: str
    kind: Kind
    weights: Path | None = None
    skeleton: ModelSpec | None = None

    @classmethod
    def parse(cls, text: str, *, weights: Path | None = None, factory: str | None = None) -> ModelSpec:
        """Read what was typed.

        Args:
            text: Value of MODEL.
            weights: Value of `--weights`, or None.
            factory: Value of `--factory`, or None.

        Raises:
            UsageError: The text names no model, or an option does not go with it.
        """
        spec = cls(text, _kind(text), weights)
        if weights is not None and not weights.is_file():
            raise UsageError(
                f"--weights {weights}", law="a safetensors file", got="no such file", cure="check the path"
            )
        if weights is not None and spec.kind in {"huggingface", "checkpoint"}:
            raise UsageError(
                f"--weights {weights}", law="a model without weights of its own", got=text, cure="leave --weights out"
            )
        if spec.kind != "checkpoint":
            if factory is not None:
                raise UsageError(
                    f"--factory {factory}", law="goes with a rankfold checkpoint", got=text, cure="leave --factory out"
                )
            return spec
        if factory is None:
            raise UsageError(
                text,
                law="a checkpoint holds no code: --factory names what builds the original architecture",
                got="no --factory",
                cure="add --factory package.module:factory (or timm:NAME, torchvision:NAME, a directory)",
            )
        skeleton = cls(factory, _kind(factory))
        if skeleton.kind == "checkpoint":
            raise UsageError(
                f"--factory {factory}", law="the original architecture", got="another checkpoint", cure=CURE
            )
        return replace(spec, skeleton=skeleton)

    @staticmethod
    def is_checkpoint(text: str) -> bool:
        """Whether a name is that of a rankfold checkpoint."""
        return (Path(text) / "plan.json").is_file()

    @property
    def directory(self) -> Path | None:
        """The Hugging Face directory of the model, which may hold a tokenizer; None without one."""
        if self.skeleton is not None:
            return self.skeleton.directory
        return Path(self.text) if self.kind == "huggingface" else None

    @property
    def origin(self) -> str:
        """Origin of the model's weights: "file", "factory", "directory", "checkpoint", or "random"."""
        if self.weights is not None:
            return "file"
        own = {"factory": "factory", "huggingface": "directory", "checkpoint": "checkpoint"}
        return own.get(self.kind, "random")

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the weights that a reader must know."""
        if self.origin != "random":
            return ()
        return (f"the weights of {self.text} are RANDOM, since no --weights FILE was given and nothing is downloaded",)

    def load(self, *, seed: int, device: torch.device) -> nn.Module:
        """Make the model, in eval mode. Random weights are drawn by the seed.

        Raises:
            UsageError: An unknown name; near matches are given.
            DependencyError: The package that defines the model is not installed.
            LoadError: The model cannot be made, or its weights do not fit.
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._make()
        if self.weights is not None:
            load_weights(model, self.weights)
        return model.to(device).eval()

    def _make(self) -> nn.Module:
        makers: dict[Kind, Callable[[], nn.Module]] = {
            "factory": lambda: call_factory(self.text),
            "timm": lambda: make_timm(self.text.partition(":")[2]),
            "torchvision": lambda: make_torchvision(self.text.partition(":")[2]),
            "huggingface": lambda: load_huggingface(Path(self.text)),
            "checkpoint": self._load_checkpoint,
        }
        return makers[self.kind]()

    def _load_checkpoint(self) -> nn.Module:
        from rankfold.store.checkpoint import load

        if self.skeleton is None:
            raise TypeError("a checkpoint was not parsed with a factory")
        return load(self.text, factory=self.skeleton._make)


def _kind(text: str) -> Kind:
    path = Path(text)
    if path.is_dir():
        if ModelSpec.is_checkpoint(text):
            return "checkpoint"
        if (path / "config.json").is_file():
            return "huggingface"
        raise UsageError(
            text,
            law="the directory of a model holds config.json (Hugging Face) or plan.json (rankfold)",
            got="a directory with neither",
            cure="check the path",
        )
    for prefix in ("timm", "torchvision"):
        if text.startswith(f"{prefix}:"):
            return "timm" if prefix == "timm" else "torchvision"
    if is_factory(text):
        return "factory"
    got = "a file" if path.is_file() else "no such name" if ":" in text else "no such directory"
    raise UsageError(text, law="the name of a model", got=got, cure=CURE)


def call_factory(spec: str) -> nn.Module:
    """The module that a factory returns.

    Raises:
        UsageError: The factory returns something else, or needs arguments.
        LoadError: The factory fails.
    """
    from torch import nn

    factory = import_factory(spec)
    if isinstance(factory, nn.Module):
        raise UsageError(
            spec, law="the name of a function", got="a module", cure="name a function that returns the module"
        )
    model = call(factory, spec)
    if not isinstance(model, nn.Module):
        raise UsageError(
            spec, law="a factory returns an nn.Module", got=type(model).__name__, cure="name the function that makes it"
        )
    return model


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model. Only batch norms' step counters may be missing from it.

    Raises:
        LoadError: The file is no safetensors file, or names or shapes differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        missing, unexpected = load_model(model, str(file), strict=False)
    except (SafetensorError, RuntimeError, OSError) as cause:
        raise LoadError(
            str(file), law="the weights fit the model", got=str(cause)[:300], cure="check the file and the model's name"
        ) from cause
    missing = sorted(name for name in missing if not name.endswith("num_batches_tracked"))
    if missing or unexpected:
        got = ", ".join(
            f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown to the model", unexpected))
            if names
        )
        raise LoadError(
            str(file), law="the file names every weight", got=got, cure="check the file and the model's name"
        )

"""Data by name: a factory, a folder of images, a `.npz` or `.npy`, a text file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import UsageError
from rankfold.cli._names import call, import_factory, is_factory

if TYPE_CHECKING:
    import torch

Kind = Literal["factory", "images", "arrays", "text"]
CURE = "name package.module:factory, path/to/file.py:factory, a folder of images, a .npz, a .npy, or a text file"


@dataclass(frozen=True)
class DataSpec:
    """Data as it was named, known to exist where it is a path.

    Attributes:
        text: Name as typed.
        kind: Kind of the data, by which it is read.
    """

    text: str
    kind: Kind

    @classmethod
    def parse(cls, text: str, options: DataOptions) -> DataSpec:
        """Read what was typed.

        Raises:
            UsageError: The text names no data, or an option does not go with it.
        """
        path = Path(text)
        if path.is_dir():
            return cls(text, "images")
        if path.is_file():
            return cls(text, "arrays" if path.suffix.lower() in {".npz", ".npy"} else "text")
        if not is_factory(text):
            raise UsageError(text, law="the name of data", got="no such file or folder", cure=CURE)
        if options.batch_size is not None:
            raise UsageError(
                f"--batch-size {options.batch_size}",
                law="a factory cuts its own batches",
                got=text,
                cure="leave --batch-size out",
            )
        return cls(text, "factory")

    def open(
        self,
        options: DataOptions,
        *,
        tokenizer: Path | None,
        dtype: torch.dtype,
        labels: bool,
        causal: bool,
        names: Collection[str] | None = None,
    ) -> Iterable[Any]:
        """The batches, re-iterable.

        Args:
            options: Options of the batches.
            tokenizer: Directory of the tokenizer for a text file.
            dtype: Dtype of the model's weights; floating inputs that are read from files are converted to it.
            labels: True if labels are wanted.
            causal: True if a text's tokens are their own labels.
            names: Names of the arguments that the model's forward takes, for arrays; None takes any.

        Raises:
            DataError: The data is empty, or cannot be read.
            UsageError: A text file without a tokenizer, or an unknown factory.
            DependencyError: Pillow or transformers is not installed.
        """
        if self.kind == "images":
            from rankfold.cli._images import ImageFolder

            return ImageFolder.of(Path(self.text), options, dtype)
        if self.kind == "arrays":
            from rankfold.cli._arrays import array_batches

            return array_batches(Path(self.text), options, dtype, labels=labels, names=names)
        if self.kind == "text":
            from rankfold.cli._texts import text_batches

            return text_batches(Path(self.text), options, tokenizer, labels=labels and causal)
        from rankfold.data.splits import as_batches

        batches = as_batches(call(import_factory(self.text), self.text))
        return batches if options.limit is None else Limited(batches, options.limit)


def notes_of(batches: Iterable[Any]) -> tuple[str, ...]:
    """Remarks on the source of batches that a reader must know."""
    notes: tuple[str, ...] = getattr(batches, "notes", ())
    return notes if isinstance(notes, tuple) else ()  # a factory's own data may have notes of its own


@dataclass(frozen=True, eq=False)
class Limited:
    """The first samples of some batches."""

    batches: Iterable[Any]
    limit: int

    def __iter__(self) -> Iterator[Any]:
        """Batches; the last one is cut."""
        from rankfold.data.batches import batch_size

        left = self.limit
        for batch in self.batches:
            size = batch_size(batch)
            yield batch if size <= left else _first(batch, left, size)
            left -= size
            if left <= 0:
                return


def _first(batch: Any, count: int, size: int) -> Any:
    """The first samples of a batch, in the structure it has (labels too)."""
    from torch import Tensor

    if isinstance(batch, Tensor):
        return batch[:count] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, dict):
        return {name: _first(value, count, size) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_first(value, count, size) for value in batch]
    return batch

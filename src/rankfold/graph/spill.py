"""Values of a node, one entry per micro-batch, in memory up to a limit and in nameless files beyond it."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.utils import _pytree

from rankfold.errors import OptionError, WriteError

UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
LARGE = 2**30  # bytes of values from which freed memory is given back, also without a limit
Memory: TypeAlias = "int | str | None"


def parse_memory(memory: Memory) -> int | None:
    """Bytes of a limit such as `"512MB"` (1 MB is 2²⁰ bytes), an int, or None.

    Raises:
        OptionError: Anything else, or less than 1 byte.
    """
    if memory is None or (isinstance(memory, int) and not isinstance(memory, bool) and memory > 0):
        return memory
    if isinstance(memory, str):
        text = memory.strip().upper()
        unit = next((name for name in sorted(UNITS, key=len, reverse=True) if text.endswith(name)), "")
        number = text.removesuffix(unit).strip()
        if unit and number.replace(".", "", 1).isdecimal() and float(number) * UNITS[unit] >= 1:
            return int(float(number) * UNITS[unit])
    raise OptionError(
        "memory", law='bytes as an int, or a text such as "512MB"', got=repr(memory), cure="None is no limit"
    )


class Spill:
    """Store of values: in memory while all of them together are below a limit, in files after that.

    The files have no name, so the system frees them when they are closed, however the process ends. They are
    read and written, not mapped: a mapped file counts as resident memory.

    Args:
        limit: Largest number of bytes of all entries in memory; None is no limit.
        folder: Folder of the files; None is the system's folder for temporary files.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self.held = 0
        self.highest = 0
        self.written = 0

    def values(self, entries: Iterable[Any] = ()) -> Values:
        """Values that keep to this limit, with some entries in them."""
        values = Values(self)
        for entry in entries:
            values.append(entry)
        return values

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes may be in memory."""
        return self._limit is None or self.held + size <= self._limit

    def tidy(self) -> None:
        """Give memory that was freed back to the system; glibc keeps it otherwise, and twice the peak can pile up.

        The system allocates it anew page by page, which costs time: without a limit small values are left alone.
        """
        worth, self.highest = self._limit is not None or self.highest > LARGE, self.held
        if worth and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing
            if trim is not None:
                trim(0)

    def open(self) -> IO[bytes]:
        """A new nameless file."""
        try:
            return tempfile.TemporaryFile(prefix="rankfold-", dir=self._folder)
        except OSError as cause:
            raise _unwritable(self._folder, cause) from cause


@dataclass(frozen=True, eq=False)
class _Stored:
    """Offset of a tensor in the file, and its layout."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Values(Sequence[Any]):
    """One entry per micro-batch: a tensor, or any nest of tensors. An entry that was spilled is read anew at each use.

    An entry is returned with the bits, the layout and the device that it had when it was added.

    Args:
        spill: The limit that these values share with others.
    """

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._entries: list[Any] = []
        self._sizes: list[int] = []
        self._file: IO[bytes] | None = None
        self._end = 0
        self._in_memory = [0]  # shared with the finalizer, which must not hold `self`
        weakref.finalize(self, _forget, spill, self._in_memory)

    def append(self, entry: Any) -> None:
        """Add the next micro-batch's entry."""
        size = sum(leaf.untyped_storage().nbytes() for leaf in _tensors(entry))
        if not self._spill.has_room(size):
            entry, size = _pytree.tree_map_only(Tensor, self._write, entry), 0
        self._entries.append(entry)
        self._sizes.append(0)
        self._count(len(self._entries) - 1, size)

    def release(self, index: int) -> None:
        """Forget an entry that is not read any more; the others keep their places."""
        self._entries[index] = None
        self._count(index, 0)

    def __len__(self) -> int:
        """Number of entries, released ones included."""
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """An entry, read from the file where it was spilled."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _pytree.tree_map_only(_Stored, self._read, self._entries[index])

    def _count(self, index: int, size: int) -> None:
        change = size - self._sizes[index]
        self._sizes[index] = size
        self._in_memory[0] += change
        self._spill.held += change
        self._spill.highest = max(self._spill.highest, self._spill.held)

    def _write(self, tensor: Tensor) -> _Stored:
        if self._file is None:
            self._file = self._spill.open()
            weakref.finalize(self, self._file.close)
        dense = tensor.detach()
        if not _fills_its_storage(dense):
            dense = dense.contiguous()
        stored = _Stored(self._end, dense.shape, dense.stride(), dense.dtype, dense.device)
        try:
            self._file.seek(self._end)
            self._end += self._file.write(memoryview(_bytes(dense.cpu())))
        except OSError as cause:
            raise _unwritable(self._spill._folder, cause) from cause
        self._spill.written += dense.numel() * dense.element_size()
        return stored

    def _read(self, stored: _Stored) -> Tensor:
        if self._file is None:
            raise RuntimeError("nothing was written")
        tensor = torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype)
        self._file.seek(stored.offset)
        size = self._file.readinto(memoryview(_bytes(tensor)))  # type: ignore[attr-defined]
        if size != tensor.numel() * tensor.element_size():
            raise RuntimeError(f"{size} bytes of a spilled value came back")
        return tensor.to(stored.device)


def _bytes(tensor: Tensor) -> Any:
    """The elements of a tensor that fills its storage, in the order they lie in memory: NumPy bytes without a copy."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()


def _fills_its_storage(tensor: Tensor) -> bool:
    """Whether the elements lie side by side without gap or overlap, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return expected == prod(tensor.shape) and not (tensor.is_conj() or tensor.is_neg())


def _tensors(entry: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(entry) if isinstance(leaf, Tensor)]


def _forget(spill: Spill, in_memory: list[int]) -> None:
    spill.held -= in_memory[0]


def _unwritable(folder: Path | None, cause: OSError) -> WriteError:
    return WriteError(
        str(folder or tempfile.gettempdir()),
        law="values beyond the memory limit can be written to the disk",
        got=str(cause),
        cure="free some space, set TMPDIR to a larger disk, or raise `memory`",
    )

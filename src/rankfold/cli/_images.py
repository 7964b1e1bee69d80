"""A folder of images as data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli._data_options import DataOptions, spread
from rankfold.cli._errors import first_line
from rankfold.cli._libraries import optional_import
from rankfold.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CACHE_BYTES = 2**30  # most bytes of decoded images kept for a second pass


class ImageFolder:
    """Images of a folder and its sub-folders, in the order of their names, decoded when they are needed.

    `notes` has the number of images that were found, and of those that are used.

    The shorter side is brought to `size`, the middle square is cut out, pixels are scaled to 0 … 1 and normalised.
    """

    def __init__(
        self, files: list[Path], options: DataOptions, dtype: torch.dtype, notes: tuple[str, ...] = ()
    ) -> None:
        import torch

        self.notes = notes
        self._files, self._options, self._dtype = files, options, dtype
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (options.mean, options.std))
        self._decoded: dict[Path, Tensor] = {}

    @classmethod
    def of(cls, folder: Path, options: DataOptions, dtype: torch.dtype) -> ImageFolder:
        """The images under a folder.

        Raises:
            DataError: The folder holds no image.
            DependencyError: Pillow is not installed.
        """
        _pillow()
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(
                str(folder),
                law=f"a folder of images ({', '.join(sorted(SUFFIXES))})",
                got="none",
                cure="check the path",
            )
        chosen = [files[index] for index in spread(len(files), options.limit)]
        few = "all of them" if len(chosen) == len(files) else f"{len(chosen):,} of them, evenly spaced (--limit)"
        note = f"{len(files):,} images were found in {folder} and its sub-folders; {few} were used"
        return cls(chosen, options, dtype, (note,))

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._files) // self._options.step)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of shape (samples, channels, size, size)."""
        import torch

        for start in range(0, len(self._files), self._options.step):
            pixels = torch.stack([self._pixels(file) for file in self._files[start : start + self._options.step]])
            yield ((pixels / 255 - self._mean) / self._std).to(self._dtype)

    def _pixels(self, file: Path) -> Tensor:
        if file in self._decoded:
            return self._decoded[file]
        import numpy as np
        import torch

        side = self._options.size
        pillow = _pillow()
        try:
            with pillow.open(file) as image:
                picture = image.convert("RGB" if len(self._options.mean) == 3 else "L")
        except (OSError, ValueError, SyntaxError) as cause:
            raise DataError(
                str(file), law="an image that Pillow can read", got=first_line(cause), cure="take it out of the folder"
            ) from cause
        scale = side / min(picture.size)
        width, height = (max(side, round(length * scale)) for length in picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.resize((width, height), pillow.Resampling.BILINEAR)
        array = np.array(picture.crop((left, top, left + side, top + side)))
        tensor = torch.from_numpy(array.reshape(side, side, -1)).permute(2, 0, 1).contiguous()
        if (len(self._decoded) + 1) * tensor.numel() <= CACHE_BYTES:
            self._decoded[file] = tensor
        return tensor


def _pillow() -> Any:
    return optional_import("PIL.Image", package="pillow", extra="images")

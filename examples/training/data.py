"""Images to train on: CIFAR-10 from a folder, or the handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 4  # pixels that CIFAR-10's images are moved by at most
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Images of bytes and their classes.

    Attributes:
        train: Images, shape (n, channels, height, width), uint8.
        train_labels: Classes, shape (n,).
        test: Images that are not trained on.
        test_labels: Their classes.
        mean: Of each channel, in [0, 1].
        std: Of each channel.
        augmented: Whether images are moved and mirrored in training.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmented: bool

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    def normalised(self, images: Tensor) -> Tensor:
        """What a network is given for images of bytes."""
        mean, std = (torch.tensor(each, device=images.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def calibration(self, samples: int, seed: int = 0, batch: int = 128) -> list[Tensor]:
        """Unlabelled training images as they are, in batches."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:samples]
        return list(self.normalised(self.train[chosen]).split(batch))

    def held_out(self, batch: int = 500) -> list[tuple[Tensor, Tensor]]:
        """All test images with their classes, in batches."""
        return list(zip(self.normalised(self.test).split(batch), self.test_labels.split(batch), strict=True))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `SHIFT` pixels, and every other one mirrored, by chance."""
    count, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4)
    down, right = (torch.randint(2 * SHIFT + 1, (count, 1), generator=generator) for _ in range(2))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


def load(name: str) -> Images:
    """Images by name: "digits", or a folder of CIFAR-10.

    The folder holds the binary version (`data_batch_1.bin` to `_5.bin`, `test_batch.bin`), or `train` and `test` with
    sheets of 50 × 50 images (`*.webp`, lossless) and `labels.npy`.

    Raises:
        FileNotFoundError: The folder holds neither, or not all of one.
        ValueError: A file is cut off, or there is not one label for each image.
    """
    if name == "digits":
        return digits()
    folder = Path(name)
    if (folder / "test_batch.bin").is_file():
        train = _binary([folder / f"data_batch_{number}.bin" for number in range(1, 6)])
        test = _binary([folder / "test_batch.bin"])
    elif (folder / "train").is_dir():
        train, test = (_sheets(folder / part) for part in ("train", "test"))
    else:
        raise FileNotFoundError(f"{folder}: neither CIFAR-10's data_batch_*.bin, nor train/ and test/ with sheets")
    return Images(*train, *test, MEAN, STD, augmented=True)


def digits() -> Images:
    """The digits of `rankfold.digits`: 8 × 8 pixels, 1,347 to train on and 450 to test."""
    from rankfold.digits import held_out, training

    images, labels = training()
    others = held_out()
    test, test_labels = torch.cat([x for x, _ in others]), torch.cat([y for _, y in others])
    bytes_of = [(each * 255).round().to(torch.uint8) for each in (images, test)]
    return Images(bytes_of[0], labels, bytes_of[1], test_labels, (0.0,), (1.0,), augmented=False)


def _binary(files: list[Path]) -> tuple[Tensor, Tensor]:
    """CIFAR-10's binary version: a byte of the class before 3,072 of the image."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: one of the files of CIFAR-10; copy it there")
        if not (size := file.stat().st_size) or size % 3073:
            raise ValueError(f"{file}: {size} bytes are no whole rows of 3,073; copy it again")
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(rows[:, 0].astype(np.int64))


def _sheets(folder: Path) -> tuple[Tensor, Tensor]:
    """Images from sheets, row by row."""
    from PIL import Image

    files = sorted(folder.glob("*.webp"))
    if not files or not (folder / "labels.npy").is_file():
        raise FileNotFoundError(f"{folder}: sheets (*.webp) and labels.npy; found {len(files)} sheets")
    sheets = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    tiles = [sheet.reshape(50, 32, 50, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3) for sheet in sheets]
    images = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(np.load(folder / "labels.npy")).long()
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder / 'labels.npy'}: one label for each of {len(images)} images; got {tuple(labels.shape)}"
        )
    return images, labels

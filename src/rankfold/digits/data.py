"""Handwritten digits: 1,797 real scans of 8×8 pixels that ship inside scikit-learn."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rankfold.errors import DependencyError

TRAIN = 1347  # the first three quarters in scikit-learn's order; the rest is held out
BATCH = 128


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All scans, shape (1797, 1, 8, 8) in [0, 1], and their labels, shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as cause:
        raise DependencyError(
            "rankfold.digits",
            law="scikit-learn is installed, since the scans ship inside it",
            got=str(cause),
            cure="pip install 'rankfold[demo]'",
        ) from cause
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(digits.target, dtype=torch.int64)


def training() -> tuple[Tensor, Tensor]:
    """The scans the network is trained on.

    Returns:
        Images, shape (1347, 1, 8, 8), grey values in [0, 1]; labels, shape (1347,).
    """
    images, labels = _scans()
    return images[:TRAIN].clone(), labels[:TRAIN].clone()


def held_out() -> list[tuple[Tensor, Tensor]]:
    """The 450 scans the network has never seen, as (images, labels) batches."""
    images, labels = _scans()
    images, labels = images[TRAIN:].clone(), labels[TRAIN:].clone()
    return list(zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True))


def calibration() -> list[Tensor]:
    """The training scans without their labels, as batches of images."""
    return list(torch.split(training()[0], BATCH))

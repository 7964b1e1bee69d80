"""Random generators that depend on the purpose of a draw, not on earlier draws."""

from __future__ import annotations

import hashlib

import torch

from rankfold.checks import is_whole
from rankfold.errors import OptionError, shown

LEAST_POSITIONS = 16384  # positions of all samples together
LARGEST_SEED = 2**63 - 1
SEED_LAW = "an int from 0 to 2**63 - 1"


def enough_positions(features: int, per_feature: int, samples: int) -> int:
    """Positions a sample with which all samples together have `per_feature` of them for each feature.

    Args:
        features: Length of a patch.
        per_feature: Number of positions for each feature; at least 16,384 positions in all.
        samples: Number of samples that share them.
    """
    return -(-max(LEAST_POSITIONS, per_feature * features) // samples)


def generator(*key: int) -> torch.Generator:
    """A generator of its own for a key, such as (seed, site, micro-batch).

    Draws for one micro-batch are then the same whoever walks it, and in which order.
    """
    # Hashed: torch's generator reads 32 bits of a seed, and neighbouring seeds of several parts would collide.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]))


def is_seed(value: object) -> bool:
    """Whether a value is an int from 0 to 2⁶³ − 1."""
    return is_whole(value) and 0 <= value <= LARGEST_SEED


def check_seed(seed: int) -> None:
    """Refuse what is no seed.

    Raises:
        OptionError: The seed is no int from 0 to 2⁶³ − 1.
    """
    if not is_seed(seed):
        raise OptionError("seed", law=SEED_LAW, got=shown(seed), cure="leave it out, or pass an int such as 0")

"""Generators that depend on what is drawn for, not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int) -> torch.Generator:
    """A generator of its own for a key, such as (seed, site, micro-batch).

    Draws for one micro-batch are then the same whoever walks it, and in which order.
    """
    # Hashed: torch's generator reads 32 bits of a seed, and neighbouring seeds of several parts would collide.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]))

"""The closed-form re-solve at apply time."""

from rankfold.repair.lockstep import Lockstep

__all__ = ["Lockstep"]

"""The closed-form re-solve at apply time."""

from rankfold.repair.options import Lockstep

__all__ = ["Lockstep"]

"""The closed-form re-solve at apply time."""

from rankfold.plan.lockstep import Lockstep

__all__ = ["Lockstep"]

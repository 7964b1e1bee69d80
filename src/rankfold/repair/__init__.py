"""The closed-form re-solve at apply time."""

from rankfold.plan.repair import Lockstep

__all__ = ["Lockstep"]

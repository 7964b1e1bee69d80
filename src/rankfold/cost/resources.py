"""Resources that a budget can bound, amounts of them, and bounds on the whole model.

These are the *priced* resources: what any plan takes of them is known before it is carried out, by formula
(`cost/formula.py`), and is counted on the live model afterwards (`cost/counted.py`). What is known only by measuring
(time, agreement) is no resource but a `rankfold.trials.limits.Limit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from rankfold.checks import is_number
from rankfold.errors import BudgetError, shown

# Description by name, for the command line; a resource has a field of its name in `Cost` and in `Budget`.
RESOURCES = {
    "params": "Parameters",
    "macs": "Multiply-accumulates a sample",
    "bytes": "Bytes of all weights",
}


@dataclass(frozen=True)
class Cost:
    """Amounts of each resource.

    Attributes:
        params: Parameters, shared ones once.
        macs: Multiply-accumulates per sample.
        bytes: Bytes of parameters and persistent buffers, shared ones once.
    """

    params: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Sum a resource at a time."""
        return Cost(*(getattr(self, name) + getattr(other, name) for name in RESOURCES))

    def __sub__(self, other: Cost) -> Cost:
        """Difference a resource at a time."""
        return Cost(*(getattr(self, name) - getattr(other, name) for name in RESOURCES))

    def amounts(self) -> dict[str, int]:
        """Amounts by name of the resource."""
        return {name: getattr(self, name) for name in RESOURCES}


@dataclass(frozen=True)
class Holding:
    """Cost of what one module has of its own, its children left out.

    Attributes:
        path: Dotted path of the module, the first of them.
        kind: Name of its class.
        cost: Cost of its parameters and persistent buffers, a shared one at the module that comes first, and the MACs
            that its own code does, all calls together.
    """

    path: str
    kind: str
    cost: Cost


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the size of the whole model; several bounds hold together.

    A float in (0, 1] is the kept fraction of the whole original model, an int an absolute bound. It is never a
    target that may be overshot: the compressed model is at most this large.

    Attributes:
        params: Parameters; shared ones count once.
        macs: Multiply-accumulates per sample.
        bytes: Bytes of the state dict.

    Raises:
        BudgetError: No bound at all, or one that is 0, negative, a float above 1, or no number.
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None

    def __post_init__(self) -> None:
        bounds = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(bound is None for bound in bounds.values()):
            raise BudgetError(
                "Budget", law="at least one bound", got="none", cure="for half the parameters: Budget(params=0.5)"
            )
        for name, bound in bounds.items():
            if bound is None:
                continue
            if not is_number(bound) or not (0 < bound <= 1 if isinstance(bound, float) else bound > 0):
                raise BudgetError(
                    f"Budget.{name}",
                    law="a kept fraction in (0, 1] (float) or an absolute bound of at least 1 (int)",
                    got=shown(bound),
                    cure=f"for half of the original: Budget({name}=0.5)",
                )

    def bounds(self, original: Cost) -> dict[str, int]:
        """Absolute bounds, rounded down, of the resources that are bounded.

        Args:
            original: Cost of the whole original model.
        """
        result = {}
        for name, whole in original.amounts().items():
            bound = getattr(self, name)
            if bound is not None:
                result[name] = int(bound * whole + 1e-9) if isinstance(bound, float) else bound
        return result

    def check_counted(self, missed: Sequence[str]) -> None:
        """Refuse a bound on MACs where no count knows all of them.

        Args:
            missed: Operators of the model that nothing counts.

        Raises:
            BudgetError: There are such operators; they are named.
        """
        if self.macs is None or not missed:
            return
        raise BudgetError(
            "Budget.macs",
            law="every operator of the model that multiplies matrices is counted, so that the bound can be held",
            got=", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else ""),
            cure="bound params or bytes, or give torch its formula: torch.utils.flop_counter.register_flop_formula",
        )

    def check_held(self, counted: Cost, original: Cost) -> None:
        """Refuse a compressed model that is over a bound.

        Args:
            counted: Cost counted on the live compressed model.
            original: Cost of the whole original model.

        Raises:
            BudgetError: The model is over a bound; each resource is named with its bound and count.
        """
        got, before = counted.amounts(), original.amounts()
        over = {name: bound for name, bound in self.bounds(original).items() if got[name] > bound}
        if over:
            raise BudgetError(
                f"Budget.{next(iter(over))}",
                law="the compressed model, counted as it would be handed back, is within every bound",
                got=", ".join(
                    f"{name} at most {bound} where it has {got[name]} (of {before[name]})"
                    for name, bound in over.items()
                ),
                cure="its forward does other work than the original's did: ask for less, or bound params instead",
            )

    def to_json(self) -> dict[str, float | int]:
        """The bounds that are set."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }

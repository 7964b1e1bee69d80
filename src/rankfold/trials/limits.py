"""Bounds on quantities that are known only after a plan was carried out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rankfold.trials.attempts import Attempt


class Limit(ABC):
    """A bound on something that is measured, where a `Budget` bounds what has a price beforehand.

    A plan that breaks a limit drops out with a note; where every plan breaks one, the error of the first is raised.
    """

    @abstractmethod
    def check(self, attempt: Attempt) -> None:
        """Refuse the result of a plan that was carried out on all samples.

        Args:
            attempt: Result of the plan: the compressed model, its comparison on held-out samples and its cost.

        Raises:
            BudgetError: The bound does not hold; it is named with what was measured.
        """

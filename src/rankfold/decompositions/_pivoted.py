"""Low rank stored by pivots: smaller than the layer at every rank below full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from rankfold.checks import check_flag
from rankfold.decompositions._base import Decomposition, Moments, Spectrum
from rankfold.decompositions._whitened_svd import WhitenedSVD
from rankfold.errors import OptionError, shown
from rankfold.factors import PIVOTABLE, PIVOTED, Factors, PivotedFactors, Rank
from rankfold.registry import register


@register("pivoted")
@dataclass(frozen=True)
class Pivoted(Decomposition):
    """Another method's factors, stored by pivots: the same map in `r²` fewer numbers for each end that is pointwise.

    A pair `L R` of rank r takes `r (m + n)` numbers and multiplications, more than the layer's `m n` from
    `r = mn/(m + n)` on. Stored by pivots it takes `r (m + n − r)`, less than `m n` at every r below both m and n. A
    share ρ of a layer buys rank `((m + n) − √((m + n)² − 4ρmn))/2`: of 384 × 384, at half, 112 in place of 96.

    Attributes:
        method: Method whose factors are stored so; its form has a pointwise stage at an end.
        kernels: True if layers with a kernel larger than 1 are made smaller so, too. Among the default families they
            are not: a pair `k×k → r`, `1×1 → out` saves a few percent by it, and pays for a gather (ResNet-20 at half
            the parameters 1.55 of the original's time in place of 1.02, at the same accuracy).

    References:
        PIFA, ICML 2025; see `rankfold.factors.PivotedFactors` for how we differ.
    """

    method: Decomposition = field(default_factory=WhitenedSVD)
    kernels: bool = True

    def __post_init__(self) -> None:
        check_flag("Pivoted.kernels", self.kernels)
        if not isinstance(self.method, Decomposition) or self.method.form not in PIVOTABLE:
            raise OptionError(
                "Pivoted.method",
                law=f"a method whose factors are of the form {', '.join(PIVOTABLE[:-1])} or {PIVOTABLE[-1]}",
                got=str(self.method) if isinstance(self.method, Decomposition) else shown(self.method),
                cure="try WhitenedSVD(), or use the method as it is",
            )

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the statistics that the method reads."""
        return self.method.needs

    @property
    def form(self) -> str:
        """The method's form with "pivoted-" before it."""
        return PIVOTED + self.method.form

    @property
    def map(self) -> Decomposition:
        """The method."""
        return self.method.map

    def refuses(self, shape: Sequence[int]) -> str | None:
        """See the method; a kernel without `kernels`."""
        if not self.kernels and any(size > 1 for size in shape[2:]):
            return "kernels=False leaves out what has a kernel larger than 1"
        return self.method.refuses(shape)

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """The method's ranks."""
        return self.method.ranks(shape)

    def admits(self, shape: Sequence[int], rank: Rank) -> bool:
        """See the method."""
        return self.method.admits(shape, rank)

    def decompose(self, weight: Tensor, rank: Rank, moments: Moments) -> PivotedFactors:
        """See `Decomposition.decompose`."""
        return PivotedFactors(self.method.decompose(weight, rank, moments))

    def refine(self, factors: Factors, weight: Tensor, moments: Moments) -> Factors:
        """The method's factors refined, stored by pivots."""
        own = factors.base if isinstance(factors, PivotedFactors) else factors
        better = self.method.refine(own, weight, moments)
        return factors if better is own else PivotedFactors(better)

    def errors(self, weight: Tensor, moments: Moments) -> Tensor:
        """The method's errors: the map is the same."""
        return self.method.errors(weight, moments)

    def judged_errors(self, weight: Tensor, moments: Moments, judge: Moments) -> Tensor:
        """The method's errors."""
        return self.method.judged_errors(weight, moments, judge)

    def spectra(self, weight: Tensor, moments: Moments) -> tuple[Spectrum, ...]:
        """The method's spectra."""
        return self.method.spectra(weight, moments)

    def changes(self, weight: Tensor, moments: Moments, gradient: Tensor) -> Tensor | None:
        """The method's changes."""
        return self.method.changes(weight, moments, gradient)

    def at_multiples(self, multiple: int) -> Pivoted:
        """The method at multiples, stored by pivots."""
        return replace(self, method=self.method.at_multiples(multiple))

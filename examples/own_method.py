"""A method of your own: one class, and every budget, selector, checkpoint and report works with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

import rankfold as rf
from rankfold.digits import calibration, held_out, trained
from rankfold.errors import OptionError
from rankfold.factors import Rank
from rankfold.linalg.precision import widen
from rankfold.linalg.spectrum import tail_energy
from rankfold.linalg.svd import svd


@rf.register("scaled-svd")
@dataclass(frozen=True)
class ScaledSVD(rf.Decomposition):
    """SVD of the weight with every input scaled by its strength: `W D = UΣVᵀ`, `L = U_r`, `R = U_rᵀ W`.

    Half way between plain SVD, which knows no inputs, and whitened SVD, which also knows how they hang together.

    Attributes:
        power: `D = diag(E[x²])^{power/2}`; 0 is plain SVD, 1 scales by the root mean square.
    """

    power: float = 0.5
    needs = ("input-gram", "input-mean")  # what has to be collected for it

    @property
    def form(self) -> str:
        """`k×k → r`, then `1×1 → out`."""
        return "matrix"

    def ranks(self, shape: Sequence[int]) -> list[Rank]:
        """Every rank up to the smaller side; the last one is exact."""
        return list(range(1, min(shape[0], prod(shape[1:])) + 1))

    def decompose(self, weight: Tensor, rank: Rank, moments: rf.Moments) -> rf.MatrixFactors:
        """The best map of that rank in the scaled metric."""
        ranks = self.ranks(weight.shape)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank not in ranks:
            raise OptionError(
                str(self), law=f"a rank from 1 to {ranks[-1]}", got=repr(rank), cure="choose one of these"
            )
        flat = widen(weight).flatten(1)
        u = svd(flat * self.scale(moments))[0][:, :rank]
        out, inputs, *kernel = weight.shape
        left, right = u.reshape(out, rank, *[1] * len(kernel)), (u.mT @ flat).reshape(rank, inputs, *kernel)
        return rf.MatrixFactors(*(each.to(weight.dtype).contiguous().clone() for each in (left, right)))

    def errors(self, weight: Tensor, moments: rf.Moments) -> Tensor:
        """All ranks at once. Without this method the base class would decompose at every rank to find out."""
        return tail_energy(svd(widen(weight).flatten(1) * self.scale(moments))[1])[1:]

    def scale(self, moments: rf.Moments) -> Tensor:
        """`D`, as a vector; ones where no input was ever active."""
        strength = moments.metric(self).diagonal().clamp_min(0) ** (self.power / 2)
        return strength if bool(strength.any()) else torch.ones_like(strength)


if __name__ == "__main__":
    model, images, new = trained(), calibration(), held_out()
    for method in (rf.SVD(), ScaledSVD(), rf.WhitenedSVD()):
        out = rf.compress(model, images, budget=rf.Budget(params=0.3), families=[method], selector=rf.Lagrangian())
        seen = rf.compare(model, out.model, new)
        print(f"{method!s:<13} {out.report.after.params:>7,} params  same decision on {seen.agreement:.1%}")

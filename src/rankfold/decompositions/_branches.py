"""Removal of whole residual branches; the layers after them take up what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankfold.checks import check_count
from rankfold.decompositions._base import Family
from rankfold.registry import register


@register("branches")
@dataclass(frozen=True)
class Branches(Family):
    """Remove whole residual branches: attention or MLP of a block, the convolutions of a block, whole blocks.

    Of `skip + f(skip)` nothing but `skip` stays, or `skip + c` with a constant `c` where plain code goes on adding: the
    last layer of the branch has rank 0. What only feeds the branch leaves the module tree with the time that it took,
    and no new operator is added. The lockstep repair goes on as ever: the last layer of the next branch has
    `y + (skip − skip')/a` as its target, and so takes up what is missing.

    Which branch goes is decided after repair, one at a time: of the branches whose loss seems to cost least for what it
    saves, a few are removed on a part of the samples, and the one after whose removal the outputs are closest to the
    original's for what it saves is gone. Alone, branches go until the budget holds. Beside other families, each step
    has the other families cut less for what the branch saves, and steps end where the outputs come no closer.

    Attributes:
        tried: Number of branches that are tried at each step.

    References:
        ReplaceMe, arXiv 2505.02819, removes consecutive transformer blocks and folds one linear map into the layer
        before. We differ in single branches of any network that adds them, in the layers that take the loss up (all
        that follow), and in a choice after repair.
    """

    needs: ClassVar[tuple[str, ...]] = ("input-gram", "input-mean")
    sized_by: ClassVar[str] = "depth"
    cuts_fixed: ClassVar[bool] = True
    tried: int = 3

    def __post_init__(self) -> None:
        check_count("Branches.tried", self.tried)

"""Options of the lockstep repair."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold.checks import check_count, check_flag, check_number
from rankfold.registry import added, register


@register("lockstep")
@dataclass(frozen=True)
class Lockstep:
    """Walk original and compressed network together and re-solve every site in closed form.

    At a site with original output `y` and compressed input `x'`: `W* = argmin E‖y − Wx' − b‖² + λ‖W − W₀‖²`, then the
    plan's method factorises `W*` in the metric of `x'`, and the bias makes the mean output right. A dense site is
    re-solved too. Where the output reaches a residual `add` through per-channel factors `a` only, the target is
    `y + (skip − skip')/a`, so that the site also takes up the error its skip branch carries. A layer without a bias
    gets none: a batch norm right behind it takes the shift into its running mean, otherwise raw moments are used.

    With an anchor `α` below 1 the target `t` of a site is mixed with what its own weight makes of its input:
    `α t + (1 − α)(W₀x' + b₀)`. Few samples hold noise, and α is how far it is followed.

    Where an activation `φ` alone reads the output, perhaps behind a norm and a residual `add`, what counts is the error
    of `φ`. The site is fitted anew to working targets `ŷ + w (t − ŷ)`, with the squared secant slope `w` of `φ` between
    what `t` and the last fit's `ŷ` give it, at least 0.3 and at most 1; the fit that is best past `φ` on held-out
    samples is taken.

    A site whose repair does not lower the error on n held-out samples by more than `0.16/√n` of it keeps the
    unrepaired layer.

    Attributes:
        ridge: Ridge `λ` relative to the mean input energy, in (0, 1].
        absorb_skip: True if targets include the skip branch's error.
        dense: True if sites that stay dense are re-solved.
        samples_per_feature: Number of positions used, as a multiple of a layer's patch length (at least 16,384 in all).
        batch: Number of samples in a micro-batch.
        reestimate_batch_norms: True if batch norms get new running moments at the end, from the fitted samples; see
            `rankfold.reestimate_batch_norms` for what that can cost.
        anchor: Share `α` of the original's output in the target, in (0, 1]; 1 is the original's output alone.
        activation: Number of fits to working targets at a site in front of an activation; 0 fits the output alone.
    """

    ridge: float = 1e-3
    absorb_skip: bool = True
    dense: bool = True
    samples_per_feature: int = 48
    batch: int = 128
    reestimate_batch_norms: bool = False
    anchor: float = added(1.0)
    activation: int = added(2, before=0)

    def __post_init__(self) -> None:
        law = "a number in (0, 1]"
        check_number("Lockstep.ridge", self.ridge, law=law, cure="try 1e-3", high=1, open_low=True)
        check_number("Lockstep.anchor", self.anchor, law=law, cure="try 1.0, or 0.5", high=1, open_low=True)
        for name in ("absorb_skip", "dense", "reestimate_batch_norms"):
            check_flag(f"Lockstep.{name}", getattr(self, name))
        if type(self.activation) is not int or self.activation != 0:
            check_count("Lockstep.activation", self.activation, cure="try 2, or 0 for none")
        for name in ("samples_per_feature", "batch"):
            check_count(f"Lockstep.{name}", getattr(self, name))

"""Warnings that a reader of a report must not miss."""

from __future__ import annotations

import math

from rankfold.comparison.compare import Comparison, OutputComparison

LEAST_AGREEMENT = 0.9  # share of decisions kept, below which a network is called changed
MOST_ERROR = 0.1  # relative error of values, above which a network is called changed
LEAST_COSINE = 0.9  # mean cosine of embeddings, below which a network is called changed
FEW_SAMPLES = 32  # samples to fit on; with fewer, neither moments nor judgement mean much
DEVIATIONS = 1.96  # standard deviations of a normal variable, for an interval of 95 %


def lost(comparison: Comparison | None, *, held_out: bool) -> list[str]:
    """A line for each output of which too much is lost, by the point estimate.

    Args:
        comparison: Comparison of the compressed model with the original, or None.
        held_out: True if it is on samples that nothing was fitted on.
    """
    if comparison is None:
        return []
    on = f"on {comparison.samples} {'held-out' if held_out else 'fitted'} inputs"
    several = len(comparison.outputs) > 1
    lines = []
    for output in comparison.outputs:
        what = _lost(output, comparison.samples)
        if what is not None:
            where = f" in {output.name}" if several else ""
            lines.append(f"the compressed model is no longer the original{where}: {what}, {on}")
    return lines


def _lost(output: OutputComparison, samples: int) -> str | None:
    if output.agreement is not None:
        if output.agreement >= LEAST_AGREEMENT:
            return None
        low, high = wilson(output.agreement, samples)
        return f"{output.agreement:.1%} of the decisions are the same (95 % interval {low:.1%} to {high:.1%})"
    if output.cosine is not None:
        return None if output.cosine >= LEAST_COSINE else f"the mean cosine is {output.cosine:.3f}"
    return None if output.relative_error <= MOST_ERROR else f"the relative error is {output.relative_error:.3g}"


def few(samples: int | None, *, held_out: bool) -> list[str]:
    """A line where samples are few.

    Args:
        samples: Number of samples that were fitted on; None where it is not known.
        held_out: True if other samples were held out.
    """
    if samples is None or samples >= FEW_SAMPLES:
        return []
    judged = "few were held out" if held_out else "none was held out, so nothing here says what others lose"
    return [f"only {samples} calibration samples were fitted on, and {judged}: give {FEW_SAMPLES} at the very least"]


def slower(latency: float | None, spread: tuple[float, float] | None) -> list[str]:
    """A line where the compressed model takes longer, by more than the spread of the measurement.

    Args:
        latency: Time of the compressed model over the original's, or None.
        spread: Lower and upper quartile of that ratio, or None.
    """
    if latency is None or spread is None or not spread[0] > 1:
        return []
    return [
        f"the compressed model is SLOWER than the original here: {latency:.2f} × its time "
        f"(quartiles {spread[0]:.2f} and {spread[1]:.2f})"
    ]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval that holds a probability at 95 % where `share` of `count` samples were seen.

    `(p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)`, z = 1.96.

    References:
        Wilson, J. Am. Stat. Assoc. 22 (1927). We differ for outputs with several decisions a sample, which do not vary
        independently: `n` is the number of samples all the same.
    """
    square = DEVIATIONS**2 / count
    middle = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))

"""The report as plain text: the budget, the result, its cost, and the warnings."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rankfold.cost.resources import RESOURCES

if TYPE_CHECKING:
    from rankfold.comparison.compare import Comparison
    from rankfold.comparison.tally import OutputComparison
    from rankfold.report.data import Report

STAGES = ("trace", "statistics", "gradients", "curves", "plans", "repair", "apply", "latency")  # in order
WELL_BELOW = 0.8  # where less than this share of the whole can be cut, what is left of that share is shown, too
REASON = 60  # characters of a reason that are shown


def render(report: Report) -> str:
    """Plain text, no colours; the layers and the plans that were tried are in `render_layers`.

    Args:
        report: The report.
    """
    asked = ", ".join(f"{name} {bound}" for name, bound in report.budget.items())
    lines = [f"{report.model}: compressed without training{f' to {asked}' if asked else ''}"]
    for name in RESOURCES:
        before, after = getattr(report.before, name), getattr(report.after, name)
        bound = f" (budget {report.budget[name]})" if name in report.budget else ""
        lines.append(f"{name:<8} {before:>15,} → {after:>15,}   {after / max(before, 1):.3f} kept{bound}")
    lines += _of_what_can_be_cut(report)
    if report.latency is not None:
        spread = report.latency_spread
        between = f" (quartiles {spread[0]:.2f} and {spread[1]:.2f})" if spread is not None else ""
        lines.append(f"latency  {report.latency:.2f} of the original's{between}, measured in the same run")
    if report.comparison is not None:
        c = report.comparison
        on = "{} held-out inputs" if report.held_out else "the {} calibration inputs it was fitted on"
        lines.append(f"on {on.format(c.samples)}: {', '.join(alike(c))}")
        lines += [f"outputs taken for: {c.taken_for}"] if c.outputs else []
    lines += [_changed(report), *_unchanged(report)]
    if report.candidates:
        taken = next((one.selector for one in report.candidates if one.taken), "none")
        tried = len({one.selector for one in report.candidates})
        lines.append(f"plans tried: {tried}, taken: {taken}; report.table() shows them and every layer")
    if report.seconds:
        stages = sorted(report.seconds, key=lambda name: (*STAGES, name).index(name))
        lines.append("seconds: " + ", ".join(f"{name} {report.seconds[name]:.1f}" for name in stages))
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"WARNING: {warning}" for warning in report.warnings]
    return "\n".join(lines) + "\n"


def _changed(report: Report) -> str:
    """The line on how many layers were made smaller, by the form they were given."""
    rows = [row for row in report.rows if row.before is not None]
    forms = Counter(row.form for row in rows if row.before != row.after)
    became = ", ".join(f"{count} {form}" for form, count in forms.most_common())
    return f"layers:  {sum(forms.values())} of {len(rows)} made smaller{f' ({became})' if became else ''}"


def _unchanged(report: Report) -> list[str]:
    """The line on the share of the model that stays as it was, and the commonest reason for it."""
    touched = [row for row in report.rows if row.before is not None and row.before != row.after]
    amounts = report.before.amounts()
    shares = [
        f"{1 - sum(row.before.amounts()[name] for row in touched if row.before) / max(amounts[name], 1):.1%} of {name}"
        for name in ("params", "macs")
    ]
    changed = {row.path for row in touched}
    reasons = Counter(row.why for row in report.rows if row.path not in changed and row.why)
    why = ""
    if reasons:
        (reason, count), *others = reasons.most_common()
        short = reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"
        more = f", and {len(others)} other reason{'s' * (len(others) > 1)}" if others else ""
        why = f"; {count} layer{'s' * (count > 1)}: {short}{more}"
    return [f"left as it was: {' and '.join(shares)}{why}"]


def _of_what_can_be_cut(report: Report) -> list[str]:
    """The line on the kept share of the layers in the table, for resources of which they hold well below the whole."""
    parts = []
    for name, whole in report.before.amounts().items():
        before = sum(row.before.amounts()[name] for row in report.rows if row.before is not None)
        after = sum(row.after.amounts()[name] for row in report.rows if row.after is not None)
        if 0 < before < WELL_BELOW * whole:
            parts.append(f"{name} {after / before:.3f} kept (it is {before / whole:.2f} of the whole)")
    return [f"of what can be cut: {', '.join(parts)}"] if parts else []


def alike(comparison: Comparison) -> list[str]:
    """Figures of how alike two models are, chosen by the kind of each output."""
    several = len(comparison.outputs) > 1
    parts = []
    for each in comparison.outputs:
        of = f"{each.name} " if several else ""
        if each.agreement is not None and each.kl is not None:
            parts.append(f"{of}agreement {each.agreement:.4f}, KL {each.kl:.3g} nats")
        elif each.cosine is not None:
            parts.append(f"{of}mean cosine {each.cosine:.4f}")
        if several:
            parts.append(f"{of}relative error {_error(each):.3g}")
    errors = [_error(each) for each in comparison.outputs] or [comparison.relative_error]
    return [*parts, f"relative output error {sum(errors) / len(errors):.3g}"]


def _error(output: OutputComparison) -> float:
    """Relative error of an output.

    For logits it is the divergence by which candidates are ranked, in the softened Fisher metric: a shift of all of
    them changes nothing.
    """
    return output.relative_error if output.agreement is None else output.divergence

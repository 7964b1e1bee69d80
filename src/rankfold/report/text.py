"""The report as text: a table and a summary."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rankfold.plan import ERROR

if TYPE_CHECKING:
    from rankfold.graph.channels import Channels
    from rankfold.graph.sites import Sites
    from rankfold.metrics.compare import Comparison
    from rankfold.report.data import Report


def render(report: Report, *, width: int = 110) -> str:
    """Plain text, no colours.

    Args:
        report: The report.
        width: Columns.
    """
    table = Table(title=f"{report.model}: every layer before and after", title_justify="left", box=None, pad_edge=False)
    for name, right in (
        ("layer", 0),
        ("shape", 0),
        ("becomes", 0),
        ("rank", 1),
        ("params", 1),
        ("MACs", 1),
        ("error", 1),
    ):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in report.rows:
        if row.before is None or row.after is None:
            continue
        rank = "" if row.rank is None else str(row.rank)
        error = row.why.removeprefix(ERROR) if row.why.startswith(ERROR) else ""
        table.add_row(
            row.path or "(the model)",
            "×".join(map(str, row.shape)),
            row.form,
            rank,
            _change(row.before.params, row.after.params),
            _change(row.before.macs, row.after.macs),
            error,
        )
    lines = [_print(table, width)]
    skipped = [row for row in report.rows if row.before is None]
    if skipped:
        lines += ["", "left alone:", *(f"  {row.path or '(the model)'}: {row.why}" for row in skipped)]
    lines += ["", *_summary(report)]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"WARNING: {warning}" for warning in report.warnings]
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> list[str]:
    lines = []
    for name in ("params", "macs", "bytes"):
        before, after = getattr(report.before, name), getattr(report.after, name)
        asked = report.budget.get(name)
        bound = f" (budget {asked})" if asked is not None else ""
        lines.append(f"{name:<8} {before:>15,} → {after:>15,}   {after / max(before, 1):.3f} kept{bound}")
    if report.latency is not None:
        spread = report.latency_spread
        between = f" (quartiles {spread[0]:.2f} and {spread[1]:.2f})" if spread is not None else ""
        lines.append(f"latency  {report.latency:.2f} of the original's{between}, measured in the same run")
    if report.comparison is not None:
        c = report.comparison
        lines += [f"outputs taken for: {c.taken_for}"] if c.outputs else []
        on = "{} held-out inputs" if report.held_out else "the {} calibration inputs it was fitted on"
        lines.append(f"on {on.format(c.samples)}: {', '.join(alike(c))}")
    word = "held-out divergence" if report.held_out else "divergence"
    for samples in dict.fromkeys(one.samples for one in report.candidates):
        shown = "; ".join(
            f"{one.selector} {one.divergence:.4g}{' (taken)' if one.taken else ''}"
            for one in report.candidates
            if one.samples == samples
        )
        on = "" if samples is None else f", carried out on {samples} samples only"
        lines.append(f"{word} of the candidates{on}: {shown}")
    if report.seconds:
        lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()))
    return lines


def alike(comparison: Comparison) -> list[str]:
    """How alike two models are, in figures that mean something for what each output is."""
    several = len(comparison.outputs) > 1
    parts = []
    for each in comparison.outputs:
        of = f"{each.name} " if several else ""
        if each.agreement is not None and each.kl is not None:
            parts.append(f"{of}agreement {each.agreement:.4f}, KL {each.kl:.3g} nats")
        elif each.cosine is not None:
            parts.append(f"{of}mean cosine {each.cosine:.4f}")
        if several:
            parts.append(f"{of}relative error {each.relative_error:.3g}")
    return [*parts, f"relative output error {comparison.relative_error:.3g}"]


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _print(table: Table, width: int) -> str:
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False, emoji=False
    )
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def render_sites(sites: Sites, *, width: int = 110) -> str:
    """Sites and skips of a model as text, for `rankfold inspect`."""
    table = Table(title=f"{sites.model}: {len(sites)} sites", title_justify="left", box=None, pad_edge=False)
    for name, right in (("site", 0), ("kind", 0), ("weight", 0), ("params", 1), ("MACs", 1), ("also at", 0)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for site in sites:
        table.add_row(
            site.path or "(the model)",
            site.kind,
            "×".join(map(str, site.weight_shape)),
            f"{site.geometry.n_params:,}",
            f"{site.macs:,}",
            ", ".join(site.aliases),
        )
    cost = sites.cost
    lines = [_print(table, width)]
    if sites.skips:
        lines += ["", "left alone:", *(f"  {skip.path or '(the model)'}: {skip.reason}" for skip in sites.skips)]
    lines += ["", f"whole model: {cost.params:,} params, {cost.macs:,} MACs per sample, {cost.bytes:,} bytes"]
    if sites.graph.reason is not None:
        lines.append(f"note: no graph, module hooks are used instead: {sites.graph.reason}")
    return "\n".join(lines) + "\n"


def render_channels(channels: Channels, *, width: int = 110) -> str:
    """Channel groups of a model as text, for `rankfold inspect --channels`."""
    table = Table(title=f"{len(channels)} channel groups", title_justify="left", box=None, pad_edge=False)
    for name, right in (("group", 0), ("units", 1), ("made by", 0), ("read by", 0)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for group in channels:
        table.add_row(group.name or "(the model)", str(group.units), _few(list(group.made)), _few(list(group.read)))
    lines = [_print(table, width)]
    if channels.skips:
        lines += ["", "channels that stay:"]
        lines += [f"  {skip.path or '(the model)'}: {skip.reason}" for skip in channels.skips]
    return "\n".join(lines) + "\n"


def _few(paths: list[str], most: int = 3) -> str:
    shown = ", ".join(path or "(the model)" for path in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"

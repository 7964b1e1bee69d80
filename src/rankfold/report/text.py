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
    from rankfold.report.data import Report

WELL_BELOW = 0.8  # where less than this share of the whole can be cut, what is left of that share is said, too


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
    lines += _of_what_can_be_cut(report)
    if report.latency is not None:
        lines.append(f"latency  {report.latency:.2f} of the original's, measured in the same run")
    if report.comparison is not None:
        c = report.comparison
        lines.append(
            f"on {c.samples} held-out inputs: agreement {c.agreement:.4f}, KL {c.kl:.3g} nats, "
            f"relative output error {c.relative_error:.3g}"
        )
        if c.output_errors:
            lines.append(f"of each output: {', '.join(f'{error:.3g}' for error in c.output_errors)}")
    for samples in dict.fromkeys(one.samples for one in report.candidates):
        shown = "; ".join(
            f"{one.selector} {one.divergence:.4g}{' (taken)' if one.taken else ''}"
            for one in report.candidates
            if one.samples == samples
        )
        on = "" if samples is None else f", carried out on {samples} samples only"
        lines.append(f"held-out divergence of the candidates{on}: {shown}")
    if report.seconds:
        lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()))
    return lines


def _of_what_can_be_cut(report: Report) -> list[str]:
    """What is left of the layers in the table, of each resource of which they are well below the whole."""
    parts = []
    for name, whole in report.before.amounts().items():
        before = sum(row.before.amounts()[name] for row in report.rows if row.before is not None)
        after = sum(row.after.amounts()[name] for row in report.rows if row.after is not None)
        if 0 < before < WELL_BELOW * whole:
            parts.append(f"{name} {after / before:.3f} kept (it is {before / whole:.2f} of the whole)")
    return [f"of what can be cut: {', '.join(parts)}"] if parts else []


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
    lines += _reach(sites)
    if sites.graph.reason is not None:
        lines.append(f"note: no graph, module hooks are used instead: {sites.graph.reason}")
    return "\n".join(lines) + "\n"


def _reach(sites: Sites) -> list[str]:
    """Which share can be cut at all, and what no count of MACs knows."""
    from rankfold.graph.reach import reach

    shares = reach(sites)
    lines = [f"can be cut: {shares['params']:.3f} of the params, {shares['macs']:.3f} of the MACs"]
    if sites.uncounted:
        lines.append(f"note: not counted in MACs: {', '.join(sites.uncounted[:5])}")
    return lines


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

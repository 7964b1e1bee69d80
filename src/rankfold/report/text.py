"""The report as text: a table and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankfold.graph.channels import Channels
    from rankfold.graph.sites import Sites
    from rankfold.metrics.compare import Comparison
    from rankfold.metrics.tally import OutputComparison
    from rankfold.report.data import Report, Row

FEW = 3  # paths that are named of many
GAP = 1  # columns of blanks between two of a table
COLUMNS = (
    ("layer", False),
    ("shape", False),
    ("becomes", False),
    ("rank", True),
    ("params", True),
    ("MACs", True),
    ("error", True),
    ("held out", True),
)
SITE_COLUMNS = (
    ("site", False),
    ("kind", False),
    ("weight", False),
    ("params", True),
    ("MACs", True),
    ("also at", False),
)
GROUP_COLUMNS = (("group", False), ("units", True), ("made by", False), ("read by", False))

STAGES = ("trace", "statistics", "gradients", "curves", "plans", "repair", "apply", "latency")  # as they come
WELL_BELOW = 0.8  # where less than this share of the whole can be cut, what is left of that share is said, too


def render(report: Report, *, width: int = 110) -> str:
    """Plain text, no colours.

    Args:
        report: The report.
        width: Columns.
    """
    table: list[list[str]] = []
    for row in report.rows:
        if row.before is None or row.after is None:
            continue
        rank = "" if row.rank is None else str(row.rank)
        error = "" if row.error is None else f"{row.error:.3g}"
        held_out = "" if row.held_out is None else " → ".join(f"{each:.2g}" for each in row.held_out)
        table.append(
            [
                row.path or "(the model)",
                "×".join(map(str, row.shape)),
                row.form,
                rank,
                _change(row.before.params, row.after.params),
                _change(row.before.macs, row.after.macs),
                error,
                held_out,
            ]
        )
    columns: Sequence[tuple[str, bool]] = COLUMNS
    if not any(line[-1] for line in table):  # no repair: nothing was judged on held-out samples
        columns, table = columns[:-1], [line[:-1] for line in table]
    lines = _laid_out(f"{report.model}: every layer before and after", columns, table, width)
    lines += _left_alone(report.rows)
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
        stages = sorted(report.seconds, key=lambda name: (*STAGES, name).index(name))
        lines.append("seconds: " + ", ".join(f"{name} {report.seconds[name]:.1f}" for name in stages))
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
            parts.append(f"{of}relative error {_error(each):.3g}")
    errors = [_error(each) for each in comparison.outputs] or [comparison.relative_error]
    return [*parts, f"relative output error {sum(errors) / len(errors):.3g}"]


def _error(output: OutputComparison) -> float:
    """Of logits as candidates are ranked, in the softened Fisher metric: a shift of all changes nothing."""
    return output.relative_error if output.agreement is None else output.divergence


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _left_alone(rows: Sequence[Row]) -> list[str]:
    """The layers that nothing was done to, and those that were made smaller but keep their channels, by reason."""
    changed = {row.path for row in rows if row.before is not None and row.before != row.after}
    lines: list[str] = []
    for title, there in (("left alone:", False), ("made smaller, but their channels stay:", True)):
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.before is None and (row.path in changed) == there:
                reasons.setdefault(row.why, []).append(row.path)
        if reasons:
            lines += ["", title, *(f"  {_many(paths)}: {why}" for why, paths in reasons.items())]
    return lines


def _many(paths: list[str]) -> str:
    """Some layers of one reason: all of them where they are few."""
    return _few(paths) if len(paths) <= FEW else f"{len(paths)} layers ({_few(paths)})"


def _laid_out(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table in which no cell is broken. Where it is too wide, each row's first cell, a path, has a line of its own.

    Args:
        title: Line above it.
        columns: Their names, and whether numbers stand in them.
        rows: One text a column.
        width: Columns of text there are; a table whose other cells need more is wider.
    """
    sizes = [max(map(len, column)) for column in zip([name for name, _ in columns], *rows, strict=True)]
    apart = sum(sizes) + GAP * (len(columns) - 1) > width
    start = 1 if apart else 0
    header, *lines = (
        (" " * GAP)
        .join(
            cell.rjust(size) if number else cell.ljust(size)
            for cell, size, (_, number) in list(zip(row, sizes, columns, strict=True))[start:]
        )
        .rstrip()
        for row in ([name for name, _ in columns], *rows)
    )
    if not apart:
        return [title, header, *lines]
    return [
        title,
        f"{columns[0][0]}:",
        f"  {header}",
        *(line for row, rest in zip(rows, lines, strict=True) for line in (row[0], f"  {rest}")),
    ]


def render_sites(sites: Sites, *, width: int = 110) -> str:
    """Sites and skips of a model as text, for `rankfold inspect`."""
    table = [
        [
            site.path or "(the model)",
            site.kind,
            "×".join(map(str, site.weight_shape)),
            f"{site.geometry.n_params:,}",
            f"{site.macs:,}",
            ", ".join(site.aliases),
        ]
        for site in sites
    ]
    cost = sites.cost
    lines = _laid_out(f"{sites.model}: {len(sites)} sites", SITE_COLUMNS, table, width)
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
    table = [
        [group.name or "(the model)", str(group.units), _few(list(group.made)), _few(list(group.read))]
        for group in channels
    ]
    lines = _laid_out(f"{len(channels)} channel groups", GROUP_COLUMNS, table, width)
    if channels.skips:
        lines += ["", "channels that stay:"]
        lines += [f"  {skip.path or '(the model)'}: {skip.reason}" for skip in channels.skips]
    return "\n".join(lines) + "\n"


def _few(paths: list[str], most: int = FEW) -> str:
    shown = ", ".join(path or "(the model)" for path in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"

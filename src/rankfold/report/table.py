"""Tables of a report, or of a model's layers, line by line; no path is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankfold.channels.groups import Channels
    from rankfold.report.data import Report, Row
    from rankfold.sites.site import Sites

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


def render_layers(report: Report, *, width: int = 110) -> str:
    """Every layer before and after, what was left alone and why, all plans that were tried, and the details.

    Args:
        report: The report.
        width: Width of the text in columns.
    """
    table: list[list[str]] = []
    for row in report.rows:
        if row.before is None or row.after is None:
            continue
        table.append(
            [
                row.path or "(the model)",
                "×".join(map(str, row.shape)),
                row.form,
                "" if row.rank is None else str(row.rank),
                _change(row.before.params, row.after.params),
                _change(row.before.macs, row.after.macs),
                "" if row.error is None else f"{row.error:.3g}",
                "" if row.held_out is None else " → ".join(f"{each:.2g}" for each in row.held_out),
            ]
        )
    columns: Sequence[tuple[str, bool]] = COLUMNS
    if not any(line[-1] for line in table):  # no repair: nothing was judged on held-out samples
        columns, table = columns[:-1], [line[:-1] for line in table]
    lines = _laid_out(f"{report.model}: every layer before and after", columns, table, width)
    lines += _left_alone(report.rows)
    lines += ["", *_trials(report)] if report.candidates else []
    lines += ["", *report.details] if report.details else []
    return "\n".join(lines) + "\n"


def _trials(report: Report) -> list[str]:
    """A line for each plan that was tried, those carried out on all samples first."""
    word = "held-out divergence" if report.held_out else "divergence"
    lines = []
    for samples in dict.fromkeys(one.samples for one in report.candidates):
        on = "" if samples is None else f", carried out on {samples} samples only"
        lines.append(f"{word} of the candidates{on}:")
        own = [one for one in report.candidates if one.samples == samples]
        lines += [f"  {one.selector} {one.divergence:.4g}{' (taken)' if one.taken else ''}" for one in own]
    return lines


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
        title: Line above the table.
        columns: Name of each column, and True if it holds numbers.
        rows: Texts of each row, one a column.
        width: Width of the text in columns; a table whose other cells need more is wider.
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
    if sites.split:
        named = _few([path or "(the model)" for path in sites.split])
        lines.append(f"note: attention is split into linear layers first: {named}")
    if sites.graph.reason is not None:
        lines.append(f"note: no graph, module hooks are used instead: {sites.graph.reason}")
    return "\n".join(lines) + "\n"


def _reach(sites: Sites) -> list[str]:
    """Lines on the share that can be cut at all, and on the operators that no count of MACs includes."""
    from rankfold.sites.reach import reach

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

"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchcore.configs.thresholds import MEAN_3_STD, ThresholdRule
from patchcore.evaluation.false_alarms import ANY_PIXEL, CONFIDENCE, IMAGE, PIXEL


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table: first column to the left, the others to the right.

    Args:
        header: Column names.
        rows: Cells as text, as many as columns.

    Returns:
        Lines joined by newlines, a rule below the header.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def false_alarm_report(row_header: str, alarms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return what a run says of its false alarms: a table, and what the rules aim at.

    Args:
        row_header: Name of the column of row names.
        alarms: Per row name the rows of `FalseAlarms.row`, one for each level.
    """
    header = (row_header, "threshold rule", "aims at", "image score", "any pixel", "pixels")
    cells, rules = [], set()
    for name, rows in alarms.items():
        of_level = {row["level"]: row for row in rows}
        first = of_level[IMAGE]
        rules.add(first["rule"])
        levels = [_share(of_level[level]) if level in of_level else "" for level in (IMAGE, ANY_PIXEL, PIXEL)]
        cells.append([name, first["rule"], _percent(first["aimed_rate"]), *levels])
    lines = [
        "false alarms: good test images with a score, or with a pixel, above the threshold, and their pixels above it",
        f"(in brackets the {100 * CONFIDENCE:g} % Clopper-Pearson interval of the true share)",
        text_table(header, cells),
    ]
    if MEAN_3_STD in rules:
        lines.append(
            f"{MEAN_3_STD} aims at {_percent(ThresholdRule().aimed_rate)} if scores of good images are Gaussian"
        )
    return "\n".join(lines)


def _share(row: Mapping[str, Any]) -> str:
    if row["rate"] is None:
        return "no good image"
    if row["interval_low"] is None:
        return _percent(row["rate"])
    low, high = 100 * row["interval_low"], 100 * row["interval_high"]
    return f"{row['num_flagged']}/{row['num_good']} = {_percent(row['rate'])} [{low:.1f}, {high:.1f}] %"


def _percent(share: float | None) -> str:
    """Return a share with two digits, of whatever size; blank for None."""
    if share is None:
        return ""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"

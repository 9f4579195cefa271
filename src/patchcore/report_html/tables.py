"""The tables of a comparison for a page: sortable numbers, texts that the template escapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchcore.evaluation.comparison_tables import (
    PUBLISHED_METRICS,
    SPEED_COLUMNS,
    SUBSET_METRICS,
    TIE_MARK,
    UNTESTED_MARK,
)
from patchcore.evaluation.paired import BEST, TIED, UNTESTED

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What it shows.
        key: What it is sorted by; None sorts to the end.
        strong: Whether nothing in its row is better.
        below: A second, smaller line.
    """

    text: str
    key: str | float | None
    strong: bool = False
    below: str = ""


@dataclass(frozen=True)
class Table:
    """One table: its first columns, `num_names` of them, name the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    num_names: int = 1
    note: str = ""


def overview_table(summary: Mapping[str, Any]) -> Table:
    """Return one row per method: its metrics over all classes, and its speed."""
    last = summary["results"][-1]["class"]
    found = {(r["method"], r["metric"]): r for r in summary["results"] if r["class"] == last}
    latency = {row["method"]: row["latency_p50_ms"] for row in summary["speed"] if row["class"] is None}
    shown = [m for m in summary["metrics"] if any(r["mean"] is not None for (_, own), r in found.items() if own == m)]
    rows = [
        [
            _name(method["label"]),
            *(_result_cell(found.get((method["label"], metric))) for metric in shown),
            _number(latency.get(method["label"]), "{:.1f}"),
        ]
        for method in summary["methods"]
    ]
    count = len(summary["classes"])
    over = f"mean over {count} classes" if count > 1 else str(last)
    header = ["method", *(summary["metrics"][m] for m in shown), "latency p50, ms"]
    return Table(f"Methods, {over}", header, rows)


def detail_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of comparison.md."""
    labels = [method["label"] for method in summary["methods"]]
    for metric, title in summary["metrics"].items():
        rows = [row for row in summary["results"] if row["metric"] == metric]
        if any(row["mean"] is not None for row in rows):
            yield _result_table(title, rows, labels)
    yield _speed_table(summary["speed"])
    yield from _subset_tables("By defect type", summary["by_defect"], labels, _defect_names, ("class", "defects"))
    yield from _subset_tables("By defect size", summary["by_size"], labels, _size_names, ("class", "size"))
    yield from _published_tables(summary)


def _result_table(title: str, rows: Sequence[Row], labels: Sequence[str]) -> Table:
    cells = {(row["class"], row["method"]): row for row in rows}
    used = [label for label in labels if any(row["method"] == label for row in rows)]
    names = dict.fromkeys(row["class"] for row in rows)
    lines = [[_name(name), *(_result_cell(cells.get((name, label))) for label in used)] for name in names]
    return Table(title, ["class", *used], lines)


def _result_cell(row: Row | None) -> Cell:
    if row is None or row["mean"] is None:
        return Cell("", None)
    text = f"{row['mean']:.3f}" if row["std"] is None else f"{row['mean']:.3f} ± {row['std']:.3f}"
    text += {TIED: TIE_MARK, UNTESTED: UNTESTED_MARK}.get(row["status"], "")
    below = ""
    if row["interval"]:
        low, high = row["interval"]
        below = f"{row['difference']:.3f} below [{low:.3f}, {high:.3f}]"
    return Cell(text, row["mean"], row["status"] in (BEST, TIED), below)


def _speed_table(rows: Sequence[Row]) -> Table:
    forms = {column: form for column, (_, form) in SPEED_COLUMNS.items()}
    lines = [
        [_name(row["method"]), *(_number(row[column], form) for column, form in forms.items())]
        for row in rows
        if row["class"] is None
    ]
    note = "Medians over seeds and classes; latency is that of one image in memory."
    return Table("Speed and memory", ["method", *(title for title, _ in SPEED_COLUMNS.values())], lines, note=note)


def _subset_tables(
    title: str, rows: Sequence[Row], labels: Sequence[str], names_of: Any, names: Sequence[str]
) -> Iterator[Table]:
    """Yield a table per metric: subsets of the images down, methods across."""
    for metric, metric_title in SUBSET_METRICS.items():
        if not any(row[metric] is not None for row in rows):
            continue
        cells = {(names_of(row), row["method"]): row[metric] for row in rows}
        used = [label for label in labels if any(row["method"] == label for row in rows)]
        lines = [
            [
                *(_name(name) for name in subset[:-1]),
                _number(subset[-1], "{}"),
                *(_number(cells.get((subset, label)), "{:.3f}") for label in used),
            ]
            for subset in dict.fromkeys(subset for subset, _ in cells)
        ]
        yield Table(f"{title}: {metric_title}", [*names, "images", *used], lines, num_names=len(names))


def _defect_names(row: Row) -> tuple[str, str, int]:
    return row["class"], row["defect_type"], row["num_images"]


def _size_names(row: Row) -> tuple[str, str, int]:
    return row["class"], f"Q{row['quartile']}: {row['min_px']} to {row['max_px']} px", row["num_images"]


def _published_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    rows = summary["published"]
    names = list(dict.fromkeys(row["row_name"] for row in rows))
    for metric, title in {**summary["metrics"], **PUBLISHED_METRICS}.items():
        own = [row for row in rows if row["metric"] == metric]
        values = {(row["method"], row["row_name"]): row["value"] for row in own}
        sources = {row["method"]: "; ".join(text for text in (row["source"], row["remark"]) if text) for row in own}
        lines = [
            [Cell(method, method, below=source), *(_number(values.get((method, name)), "{:.3f}") for name in names)]
            for method, source in sources.items()
        ]
        if lines:
            note = "Over the whole published test sets, with other code and hardware: no paired comparison."
            yield Table(f"Published, not measured here: {title}", ["method", *names], lines, note=note)


def _name(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None, form: str) -> Cell:
    return Cell("", None) if value is None else Cell(form.format(value), float(value))
